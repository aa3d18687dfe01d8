"""Reads the prompts of a recipe: one data set or a mix of several, without the rows that are too long."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from asyncflow.control.admission.prompts import BadRow, DataRow, PromptSource, Share
from asyncflow.control.settings import EvaluationData
from asyncflow.recipe.config import BadInput, Recipe, TrainSet
from asyncflow.recipe.model_folders import config_of
from asyncflow.recipe.rule_checks import RuleTrials
from workers.data.dataset_files import places_of
from workers.data.datasets import DataError, MissingField, read_rows
from workers.data.model_config import context_in
from workers.data.overlong import overlong_rows


def train_prompts(recipe: Recipe, rules: RuleTrials) -> tuple[PromptSource, list[str]]:
    """The prompts to train on, and what to report of them; `rules` will score them. Raises BadInput."""
    sets = recipe.data.sets
    if not sets:
        raise BadInput("data.train = []: want the path of a data set, or a list of at least one")
    source, notes = _read(recipe, "data.train", sets, rules)
    return source, [*_mix(source, sets), *notes]


def heldout_prompts(
    recipe: Recipe, key: str, given: EvaluationData, rules: RuleTrials
) -> tuple[PromptSource, list[str]]:
    """The prompts of that key's held-out set, and what to report of them; `rules` will score them. Raises BadInput."""
    own = TrainSet(given.path, 1.0, given.prompt or recipe.data.prompt, given.reference or recipe.data.reference)
    return _read(recipe, key, [own], rules)


def _read(recipe: Recipe, key: str, sets: list[TrainSet], rules: RuleTrials) -> tuple[PromptSource, list[str]]:
    per_set = [_rows(recipe, given, rules) for given in sets]
    shares = [Share(len(rows), given.weight) for rows, given in zip(per_set, sets, strict=True)]
    paths = ", ".join(given.path for given in sets)
    try:
        rows = [row for rows in per_set for row in rows]
        source = PromptSource(rows, recipe.models["policy"].path, recipe.seed, shares)
    except BadRow as error:
        number = int(np.searchsorted(np.cumsum([share.rows for share in shares]), error.row, side="right"))
        before = sum(share.rows for share in shares[:number])
        (place,) = places_of(sets[number].path, [error.row - before])
        raise BadInput(f"data: {place}: {error.why}") from error
    except ValueError as error:
        raise BadInput(f"data: {paths}: {error}") from error
    notes = _without_overlong(recipe, key, sets, source)
    rules.call(source, paths)
    return source, notes


class _PromptRow(DataRow, frozen=True):
    """A row that may lack a reference."""

    reference: str = ""


def _rows(recipe: Recipe, given: TrainSet, rules: RuleTrials) -> list[DataRow]:
    columns = {"prompt": given.prompt}
    if given.reference:
        columns["reference"] = given.reference
    kind, keep = DataRow if rules.need_reference else _PromptRow, rules.keep(given.prompt)
    try:
        policy = recipe.models["policy"].path
        read = read_rows(given.path, kind, columns, policy, recipe.data.chat, keep=keep)
    except MissingField as error:
        raise BadInput(f"data: {error}: data.prompt and data.reference say which (a.b: b inside of a)") from error
    except DataError as error:
        raise BadInput(f"data: {error}") from error
    rows = [DataRow(row.prompt, row.reference, rules.columns(row.columns, given.prompt), row.is_chat) for row in read]
    rules.check_columns(rows, given.path)
    return rows


def _mix(source: PromptSource, sets: list[TrainSet]) -> list[str]:
    """How the sets are mixed, one line each; none for a set alone."""
    whole = sum(given.weight for given in sets)
    return [
        f"data.train: {given.path}: {share.rows} rows, {given.weight / whole:.1%} of the prompts"
        for given, share in zip(sets, source.shares, strict=True)
        if len(sets) > 1
    ]


def _without_overlong(recipe: Recipe, key: str, sets: list[TrainSet], source: PromptSource) -> list[str]:
    """Leave out the prompts that don't fit the context together with a response, or refuse them. Raises BadInput."""
    generation = recipe.generation
    context = context_in(config_of("policy", recipe.models["policy"].path))
    bounds = [bound for bound in (generation.max_model_tokens, context) if bound]
    room = min(bounds) - generation.max_tokens if bounds else np.iinfo(np.int64).max
    overlong, notes, start = np.flatnonzero(source.lengths > room), list[str](), 0
    for given, share in zip(sets, source.shares, strict=True):
        own = overlong[(overlong >= start) & (overlong < start + share.rows)] - start
        lengths, start = source.lengths[start : start + share.rows], start + share.rows
        if not len(own):
            continue
        found = overlong_rows(given.path, own, lengths)
        why = (
            f"a context of {min(bounds)} tokens has room for prompts of {max(room, 0)} "
            f"beside generation.max_tokens = {generation.max_tokens}"
        )
        if recipe.data.overlong == "refuse":
            raise BadInput(f"{key}: {found}: {why}; {_remedies(recipe, context, int(lengths.max()))}")
        if len(own) == len(lengths):
            raise BadInput(f"{key}: {Path(given.path)}: all of its rows are too long, {found}: {why}")
        notes.append(f"{key}: left out {found}: {why}")
    source.leave_out(overlong)
    return notes


def _remedies(recipe: Recipe, context: int | None, longest: int) -> str:
    """What makes prompts of up to `longest` tokens fit."""
    limit, needed = recipe.generation.max_model_tokens, longest + recipe.generation.max_tokens
    left = min(bound for bound in (limit, context) if bound) - longest
    remedies = ["want shorter prompts", "data.overlong = 'skip', which leaves these rows out"]
    remedies += [f"generation.max_tokens = {left} or less"] * (left > 0)
    remedies += [f"generation.max_model_tokens = {needed}"] * (0 < limit < needed <= (context or needed))
    return f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
