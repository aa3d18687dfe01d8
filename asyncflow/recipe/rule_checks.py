"""Checks the rules of a recipe: each is loaded in its own process, told its columns, and called once.

The first row of the data is scored twice: with its reference as the response, and with an empty response.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.dataflow.graph import Dataflow
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.recipe.evaluations import REWARD, evaluators_of
from asyncflow.recipe.service_specs import roles_of
from workers.data.dataset_files import places_of, records
from workers.data.datasets import ALL
from workers.data.messages import conversation, is_chat
from workers.data.row_shapes import CONVERSATIONS, names_in, value_of
from workers.rewards.arguments import MESSAGES, RuleNeeds
from workers.rewards.rule_scorer import RuleScorer
from workers.rewards.rules import RULES, TRUSTED
from workers.rewards.sandbox_pool import RuleFailed
from workers.settings import Model, RewardPart
from workers.user_code import function_named, module_of

Holder = Model | RewardPart


class RuleOnTrial(NamedTuple):
    """A rule of the recipe, loaded."""

    where: str  # its key and value
    scorer: RuleScorer | None  # None: one of the ready rules that can't fail
    needs: RuleNeeds
    called: bool  # whether it is called before the run


class RuleTrials:
    """The rules that score some rows: what they ask for, and their first call."""

    def __init__(self, rules: Sequence[RuleOnTrial]) -> None:
        self.rules = rules
        self._wanted = {name for rule in rules for name in (*rule.needs.columns, *rule.needs.optional)}
        self._everything = any(rule.needs.all_columns for rule in rules)

    @property
    def need_reference(self) -> bool:
        """Whether a row without a reference can't be scored."""
        return any(rule.needs.reference for rule in self.rules)

    def keep(self, prompt: str) -> set[str]:
        """The columns of a data file to read for them; `prompt` is the column of the prompts."""
        if self._everything:
            return {ALL}
        own = {prompt.partition(".")[0], *CONVERSATIONS} if MESSAGES in self._wanted else set[str]()
        return self._wanted | own

    def columns(self, kept: Mapping[str, Any], prompt: str) -> dict[str, Any]:
        """What of a row's kept columns goes to the rules: "messages" is the prompt, if that is a conversation."""
        found = {name: value for name, value in kept.items() if self._everything or name in self._wanted}
        if MESSAGES in self._wanted and (messages := _messages_of(kept, prompt)):
            found[MESSAGES] = messages
        if prompt not in self._wanted:
            found.pop(prompt, None)  # its text is there already
        return found

    def check_columns(self, rows: Sequence[DataRow], path: str) -> None:
        """Refuse a rule that asks for a column which a row lacks. Raises BadInput."""
        for rule in self.rules:
            for name in rule.needs.columns:
                lacking = next((number for number, row in enumerate(rows) if name not in row.columns), None)
                if lacking is not None:
                    has = names_in(next(records(path)).values)
                    raise BadInput(
                        f"{rule.where}: it asks for {name!r}, which {places_of(path, [lacking])[0]} lacks; a rule's "
                        f"arguments are prompt, response, reference, raw_prompt, raw_response, prompt_ids, "
                        f"response_ids, messages, or columns of the data: {has}"
                    )

    def call(self, source: PromptSource, path: str) -> None:
        """Call each rule on the first row. Raises BadInput with what it returns or raises."""
        first = source.first()
        for rule in self.rules:
            if rule.scorer is None or not rule.called:
                continue
            for what, failure in zip(("with its reference", "with nothing"), rule.scorer.try_on(first), strict=False):
                if failure:
                    raise BadInput(
                        f"{rule.where}: on the first row of {path}, {what} as response, {failure}; correct the rule, "
                        "or set check = false beside it if it can only work during the run"
                    )


def _messages_of(kept: Mapping[str, Any], prompt: str) -> list[dict[str, Any]]:
    """The messages of a row's prompt, without an answer at its end; none where the prompt is a text."""
    values = (value_of(kept, name) for name in (prompt, *CONVERSATIONS))
    messages = next((conversation(value) for value in values if is_chat(value)), [])
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


class LoadedRules(NamedTuple):
    """The rules of a recipe by what they score."""

    rewards: RuleTrials  # the rows to train on
    metrics: Mapping[str, RuleOnTrial]  # by their name in `evaluation.metric`

    def of(self, metrics: Iterable[str]) -> RuleTrials:
        """The rules that score a held-out set with these metrics."""
        named = list(metrics)
        own = self.rewards.rules if REWARD in named else []
        return RuleTrials([*own, *(self.metrics[name] for name in named if name != REWARD)])


@contextmanager
def loaded_rules(recipe: Recipe, dataflow: Dataflow) -> Iterator[LoadedRules]:
    """Load all rules; their processes end with the block. Raises BadInput for one that can't be loaded."""
    with ExitStack() as stack:
        loaded: dict[str, tuple[RuleScorer | None, RuleNeeds]] = {}

        def on_trial(where: str, rule: str, *, called: bool) -> RuleOnTrial:
            if rule not in loaded:
                loaded[rule] = _load(where, rule, recipe, stack)
            return RuleOnTrial(f"{where} = {rule!r}", *loaded[rule], called)

        models = {f"models.{role}": recipe.models[role] for role in roles_of(dataflow)}
        holders: dict[str, Holder] = {}
        for key, model in models.items():
            holders |= {key: model} if model.rule else {f"{key}.mix.{part.name}": part for part in model.mix}
        train = [on_trial(f"{key}.rule", h.rule, called=h.check) for key, h in holders.items() if h.rule]
        unchecked = {h.rule for h in holders.values() if not h.check}
        metrics = evaluators_of(recipe)
        heldout = {rule: on_trial("evaluation.metric", rule, called=rule not in unchecked) for rule in metrics}
        yield LoadedRules(RuleTrials(train), heldout)


def _load(where: str, rule: str, recipe: Recipe, stack: ExitStack) -> tuple[RuleScorer | None, RuleNeeds]:
    if rule in TRUSTED:
        return None, RuleNeeds(reference=True)
    try:
        if not module_of(rule):
            function_named(rule, RULES, "rule")
    except LookupError as error:
        raise BadInput(f"{where}: {error.args[0]}") from error
    scorer = RuleScorer(rule, recipe.models["policy"].path, recipe.failures)
    stack.callback(scorer.close)
    try:
        return scorer, scorer.needs
    except RuleFailed as error:
        raise BadInput(f"{where}: {error}") from error
