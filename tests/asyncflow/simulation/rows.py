"""Rows without models: each carries the number of the generation that it derives from, through every stage.

Inside the world a row is a `Row`. At the join it becomes a real message with one value per row, because the real join
reads messages; the contents of a closed batch are read back from these.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from protocols.data.columns import Batch
from protocols.data.jagged import Jagged
from protocols.data.messages import Costs, LogProbs, Rollouts, Scores, Values

Owner = tuple[str, int]  # a service, and how often it had been restarted


class Request(NamedTuple):
    """A request for one row, sent to a generating stage."""

    min_version: int  # version at admission
    owner: Owner


class Row(NamedTuple):
    """One sample's row at one stage."""

    generation: int  # the generation of this sample that it derives from, 1 for the first
    oldest: int  # version of its oldest token
    critic: int  # version of the critic whose values it holds, -1 if it holds none
    owner: Owner  # the process that holds its bytes


class Content(NamedTuple):
    """What a closed batch holds for one sample on one input."""

    sample: int
    generation: int
    version: int  # of the oldest token, or of the critic; -1 for other messages


def message(kind: type[Batch], rows: Sequence[tuple[int, Row]]) -> Batch:
    """Rows as a message with one token per row, whose value is the number of the row's generation."""
    ids = np.array([sample for sample, _ in rows], np.int64)
    generations = np.array([row.generation for _, row in rows], np.float32)
    if issubclass(kind, Rollouts):
        versions = np.array([row.oldest for _, row in rows], np.int32)
        return Rollouts(
            sample_ids=ids, log_probs=_one_each(generations), versions=_one_each(versions), **_constant(len(rows))
        )
    if issubclass(kind, Values):
        critics = np.array([row.critic for _, row in rows], np.int64)
        return Values(sample_ids=ids, values=_one_each(generations), versions=critics)
    if issubclass(kind, LogProbs):
        return LogProbs(sample_ids=ids, log_probs=_one_each(generations))
    if issubclass(kind, Scores):
        return Scores(sample_ids=ids, scores=generations)
    if issubclass(kind, Costs):
        return Costs(sample_ids=ids, costs=generations)
    raise TypeError(f"no rows of {kind.__name__} travel to a join")


def contents(batch: Batch) -> list[Content]:
    """The contents of a message, row by row."""
    match batch:
        case Rollouts():
            generations, versions = batch.log_probs.values, batch.versions.values
        case Values():
            generations, versions = batch.values.values, batch.versions
        case LogProbs():
            generations, versions = batch.log_probs.values, None
        case Scores():
            generations, versions = batch.scores, None
        case Costs():
            generations, versions = batch.costs, None
        case _:
            raise TypeError(f"{type(batch).__name__} is no input of a closed batch")
    by_row: Iterable[int] = versions.tolist() if versions is not None else [-1] * len(batch)
    return [
        Content(s, int(d), int(v))
        for s, d, v in zip(batch.sample_ids.tolist(), generations.tolist(), by_row, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _offsets(rows: int) -> np.ndarray:
    return np.arange(rows + 1, dtype=np.int64)


def _one_each(values: np.ndarray) -> Jagged:
    return Jagged(values, _offsets(len(values)))


@functools.lru_cache(maxsize=256)
def _constant(rows: int) -> dict[str, Any]:
    """The columns of rollouts that the simulation does not use."""
    tokens = _one_each(np.zeros(rows, np.int32))
    octets = _one_each(np.ones(rows, np.uint8))
    return {
        "prompts": tokens,
        "references": octets,
        "columns": octets,
        "responses": tokens,
        "loss_mask": octets,
        "finishes": np.zeros(rows, np.uint8),
    }
