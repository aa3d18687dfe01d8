"""What a rule is called with: the arguments that its signature asks for, by their names.

    prompt, response, reference        texts, without special tokens
    raw_prompt, raw_response           the same with their special tokens, e.g. an end of turn
    prompt_ids, response_ids           lists of token ids
    messages                           the prompt's messages; of a plain prompt one message of the user
    any other name                     the column of that name in the row's data file; with `**columns` all of them

A rule with an argument `responses` takes a batch: every argument is a list with one entry a row, the names of texts are
plural (`prompts`, `references`, `raw_responses`), and so it returns a list. The rules of two other libraries have the
same form and run as they are: TRL's (prompts, completions, completion_ids, **columns), where chat prompts come as
messages and so do their completions, and verl's (data_source, solution_str, ground_truth, extra_info), also in plural.

A rule whose arguments have no names (`*texts`) is called with prompt, response and reference.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

MESSAGES = "messages"


class RuleRow(msgspec.Struct, frozen=True):
    """One response to score. What the rule does not ask for is left out."""

    prompt: str
    response: str
    reference: str
    raw_prompt: str = ""
    raw_response: str = ""
    prompt_ids: list[int] = []
    response_ids: list[int] = []
    columns: str = ""  # a JSON object of the row's columns, "messages" among them where the prompt is a conversation


class RuleNeeds(msgspec.Struct, frozen=True):
    """What a rule asks for beside texts, and how it wants to be called."""

    reference: bool = False
    raw: bool = False  # texts with special tokens
    ids: bool = False  # token ids
    columns: list[str] = []  # columns that every row must have
    optional: list[str] = []  # columns that it takes where a row has them
    all_columns: bool = False  # `**columns`
    batch: bool = False  # several rows in one call
    concurrent: bool = False  # `async def`: several calls at the same time in one process


Get = Callable[[RuleRow, Mapping[str, Any]], Any]  # of a row and its columns


def _messages(row: RuleRow, columns: Mapping[str, Any]) -> Any:
    return columns.get(MESSAGES) or [{"role": "user", "content": row.prompt}]


def _trl_prompt(row: RuleRow, columns: Mapping[str, Any]) -> Any:
    return columns.get(MESSAGES) or row.prompt


def _trl_completion(row: RuleRow, columns: Mapping[str, Any]) -> Any:
    return [{"role": "assistant", "content": row.response}] if columns.get(MESSAGES) else row.response


_ROW: dict[str, Get] = {
    "prompt": lambda row, _: row.prompt,
    "response": lambda row, _: row.response,
    "reference": lambda row, _: row.reference,
    "raw_prompt": lambda row, _: row.raw_prompt,
    "raw_response": lambda row, _: row.raw_response,
    "prompt_ids": lambda row, _: row.prompt_ids,
    "response_ids": lambda row, _: row.response_ids,
    MESSAGES: _messages,
}
_BATCH: dict[str, Get] = {
    **{name if name.endswith("s") else f"{name}s": get for name, get in _ROW.items()},
}
_TRL: dict[str, Get] = {
    "prompts": _trl_prompt,
    "completions": _trl_completion,
    "prompt_ids": _ROW["prompt_ids"],
    "completion_ids": _ROW["response_ids"],
    "completions_ids": _ROW["response_ids"],
}
_VERL: dict[str, Get] = {
    "solution_str": _ROW["response"],
    "ground_truth": _ROW["reference"],
    "data_source": lambda _, columns: columns.get("data_source", ""),
    "extra_info": lambda _, columns: columns.get("extra_info") or {},
}
_VERL_BATCH: dict[str, Get] = {name if name.endswith("s") else f"{name}s": get for name, get in _VERL.items()}
_VERL_COLUMNS = ["data_source", "extra_info"]
_REFERENCE = {"reference", "references", "ground_truth", "ground_truths"}
_RAW = {"raw_prompt", "raw_response", "raw_prompts", "raw_responses"}
_IDS = {"prompt_ids", "response_ids", "completion_ids", "completions_ids"}


class RuleArguments:
    """How one rule is called."""

    def __init__(self, rule: Callable[..., object]) -> None:
        parameters = _parameters_of(rule)
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._positional = not named and not any(p.kind is p.VAR_KEYWORD for p in parameters)
        known, batch, optional = _convention_of(set(named))
        self._known = {name: get for name, get in known.items() if name in named}
        others = [p for name, p in named.items() if name not in known]
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.needs = RuleNeeds(
            reference=self._positional or bool(_REFERENCE & self._known.keys()),
            raw=bool(_RAW & self._known.keys()),
            ids=bool(_IDS & self._known.keys()),
            columns=[p.name for p in others if p.default is p.empty],
            optional=[*optional, *(p.name for p in others if p.default is not p.empty)],
            all_columns=everything,
            batch=batch,
            concurrent=inspect.iscoroutinefunction(rule) or inspect.iscoroutinefunction(type(rule).__call__),
        )

    def of(self, rows: Sequence[RuleRow]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the call for these rows; one row where the rule takes no batch.

        Raises LookupError for a column that a row lacks.
        """
        if self._positional:
            return (rows[0].prompt, rows[0].response, rows[0].reference), {}
        tables = [json.loads(row.columns) if row.columns else {} for row in rows]
        pairs = list(zip(rows, tables, strict=True))
        arguments = {name: [get(row, table) for row, table in pairs] for name, get in self._known.items()}
        for name in self._columns_of(tables):
            if name in self.needs.columns and (lacking := [t for t in tables if name not in t]):
                has = ", ".join(lacking[0]) or "no other column"
                raise LookupError(f"it asks for {name!r}, which the row lacks; the row has {has}")
            arguments[name] = [table.get(name) for table in tables]
        if self.needs.batch:
            return (), arguments
        return (), {name: values[0] for name, values in arguments.items()}

    def _columns_of(self, tables: Sequence[Mapping[str, Any]]) -> list[str]:
        """The columns to pass: those that it must have, and those that a row has."""
        there = dict.fromkeys(name for table in tables for name in table)
        more = there if self.needs.all_columns else self.needs.optional
        wanted = [*self.needs.columns, *(name for name in more if name in there)]
        return [name for name in dict.fromkeys(wanted) if name not in self._known and name != MESSAGES]


def _parameters_of(rule: Callable[..., object]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(rule).parameters.values())
    except (TypeError, ValueError):  # a function written in C
        return []


def _convention_of(names: set[str]) -> tuple[dict[str, Get], bool, list[str]]:
    """The names that mean something, whether it is a batch, and the columns that some of them come from."""
    if "completions" in names:
        return _TRL, True, [MESSAGES]
    if "solution_strs" in names:
        return _VERL_BATCH, True, _VERL_COLUMNS
    if "solution_str" in names:
        return _VERL, False, _VERL_COLUMNS
    known, batch = (_BATCH, True) if "responses" in names else (_ROW, False)
    return known, batch, [MESSAGES] if MESSAGES in names else []
