"""Checks a rule that is changed during a run: it may ask only for what the run's rows have.

A run reads its data once, when it starts, and of each row the columns that its rules ask for then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from asyncflow.control.admission.prompts import DataRow
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.evaluations import REWARD, data_of
from asyncflow.recipe.service_specs import roles_of
from protocols.control.code import CodeSource
from workers.data.dataset_files import records
from workers.rewards.arguments import MESSAGES, RuleNeeds
from workers.rewards.sandbox_pool import RuleFailed, SandboxPool
from workers.user_code import BadCode, module_of


class _ScoredRows(NamedTuple):
    """Rows that a rule scores."""

    rule: str
    rows: Sequence[DataRow]
    path: str
    prompt: str  # the column of the prompts, which is no other column


def check_reloaded_rules(checked: Checked, sources: Sequence[CodeSource]) -> None:
    """Refuse changed rules that ask for what the run does not read. Blocking. Raises BadCode.

    Each is loaded in a process of its own, which ends before this returns.
    """
    changed = {source.module: source for source in sources}
    needs: dict[str, RuleNeeds] = {}
    for scored in _scored_rows(checked):
        if (source := changed.get(module_of(scored.rule))) is None:
            continue
        if scored.rule not in needs:
            needs[scored.rule] = _needs_of(scored.rule, source, checked.recipe.failures.reward_timeout_seconds)
        if lacking := _lacking(needs[scored.rule], scored):
            read = ", ".join(sorted({name for row in scored.rows for name in row.columns})) or "no other column"
            raise BadCode(
                f"{scored.rule} asks for {', '.join(lacking)}, which the run does not have for every row of "
                f"{scored.path}: it reads what its rules asked for when it started ({read}); want a new run, or a rule "
                "without"
            )


def _scored_rows(checked: Checked) -> Iterator[_ScoredRows]:
    recipe, before = checked.recipe, 0
    rewards = [rule for role in roles_of(checked.dataflow) for rule in recipe.models[role].rules]
    for given, share in zip(recipe.data.sets, checked.train.shares, strict=True):
        rows, before = checked.train.rows[before : before + share.rows], before + share.rows
        for rule in rewards:
            yield _ScoredRows(rule, rows, given.path, given.prompt)
    for given, (wanted, source) in zip(data_of(recipe).values(), checked.heldout, strict=True):
        for metric in wanted.scorers:
            for rule in rewards if metric == REWARD else [metric]:
                yield _ScoredRows(rule, source.rows, given.path, given.prompt or recipe.data.prompt)


def _needs_of(rule: str, source: CodeSource, seconds: float) -> RuleNeeds:
    pool = SandboxPool(rule, source, timeout_seconds=seconds)
    try:
        return pool.start()
    except RuleFailed as error:
        raise BadCode(str(error)) from error
    finally:
        pool.close()


def _lacking(needs: RuleNeeds, scored: _ScoredRows) -> list[str]:
    """What a rule asks for and some row lacks. What it takes where a row has it counts if the file has it."""
    rows = scored.rows
    lacking = [name for name in needs.columns if any(name not in row.columns for row in rows)]
    if needs.reference and not any(row.reference for row in rows):
        lacking.append("reference")
    read = {name for row in rows for name in row.columns} | {MESSAGES}
    in_file = next(records(scored.path)).values.keys() - {scored.prompt.partition(".")[0], "reference"}
    optional = in_file if needs.all_columns else in_file & set(needs.optional)
    lacking += sorted(optional - read - {*lacking})
    if MESSAGES in needs.optional and any(row.is_chat and MESSAGES not in row.columns for row in rows):
        lacking.append(MESSAGES)
    return lacking
