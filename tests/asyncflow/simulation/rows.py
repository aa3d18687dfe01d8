"""Rows without models: each carries the number of the generation that it derives from, through every stage.

Inside the world a row is a `Row`. Before the join it becomes a real message, one value a row, because the real
join reads messages; what a closed batch holds is read back from there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from protocols.data.columns import Batch, Jagged
from protocols.data.messages import Costs, LogProbs, Rollouts, Scores, Values

Owner = tuple[str, int]  # a service, and how often it had been restarted


class Request(NamedTuple):
    """A prompt's row on its way to a generating stage."""

    min_version: int  # version at admission
    owner: Owner


class Row(NamedTuple):
    """One sample's row at one stage."""

    drawing: int  # which drawing of this sample it derives from, 1 for the first
    oldest: int  # version of its oldest token
    critic: int  # version of the critic that valued it, -1 where none did
    owner: Owner  # whose process holds its bytes


class Content(NamedTuple):
    """What a closed batch says of one sample on one input."""

    sample: int
    drawing: int
    version: int  # of the oldest token, or of the critic; -1 for other messages


def message(kind: type[Batch], rows: Sequence[tuple[int, Row]]) -> Batch:
    """Rows as a message of one token a row, whose value is the number of the drawing."""
    ids = np.array([sample for sample, _ in rows], np.int64)
    drawings = np.array([row.drawing for _, row in rows], np.float32)
    if issubclass(kind, Rollouts):
        versions = np.array([row.oldest for _, row in rows], np.int32)
        return Rollouts(
            sample_ids=ids, log_probs=_one_each(drawings), versions=_one_each(versions), **_constant(len(rows))
        )
    if issubclass(kind, Values):
        critics = np.array([row.critic for _, row in rows], np.int64)
        return Values(sample_ids=ids, values=_one_each(drawings), versions=critics)
    if issubclass(kind, LogProbs):
        return LogProbs(sample_ids=ids, log_probs=_one_each(drawings))
    if issubclass(kind, Scores):
        return Scores(sample_ids=ids, scores=drawings)
    if issubclass(kind, Costs):
        return Costs(sample_ids=ids, costs=drawings)
    raise TypeError(f"no rows of {kind.__name__} travel to a join")


def contents(batch: Batch) -> list[Content]:
    """What the rows of a message say."""
    match batch:
        case Rollouts():
            drawings, versions = batch.log_probs.values, batch.versions.values
        case Values():
            drawings, versions = batch.values.values, batch.versions
        case LogProbs():
            drawings, versions = batch.log_probs.values, None
        case Scores():
            drawings, versions = batch.scores, None
        case Costs():
            drawings, versions = batch.costs, None
        case _:
            raise TypeError(f"{type(batch).__name__} is no input of a closed batch")
    told: Iterable[int] = versions.tolist() if versions is not None else [-1] * len(batch)
    return [
        Content(s, int(d), int(v)) for s, d, v in zip(batch.sample_ids.tolist(), drawings.tolist(), told, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _offsets(rows: int) -> np.ndarray:
    return np.arange(rows + 1, dtype=np.int64)


def _one_each(values: np.ndarray) -> Jagged:
    return Jagged(values, _offsets(len(values)))


@functools.lru_cache(maxsize=256)
def _constant(rows: int) -> dict[str, Any]:
    """The columns of rollouts that nothing here looks at."""
    tokens = _one_each(np.zeros(rows, np.int32))
    octets = _one_each(np.ones(rows, np.uint8))
    return {
        "prompts": tokens,
        "references": octets,
        "responses": tokens,
        "loss_mask": octets,
        "finishes": np.zeros(rows, np.uint8),
    }
