"""Small batches whose values identify their rows, so that a misplaced row is detected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from asyncflow.services.channels.endpoint import Frame
from asyncflow.services.channels.row_table import RowTable
from asyncflow.services.channels.shard_refs import ShardRef, pack
from asyncflow.services.runtime.local_store import LocalStore
from protocols.data.columns import Batch
from protocols.data.jagged import Jagged
from protocols.data.messages import Finish, LogProbs, Rollouts, Scores, Values
from protocols.stage import Failure


def scores(samples: Sequence[int]) -> Scores:
    """Each row's score is its id."""
    return Scores(sample_ids=np.array(samples, np.int64), scores=np.array(samples, np.float32))


def log_probs(samples: Sequence[int], tokens: int = 0) -> LogProbs:
    """Each row has `tokens` values (default: (id % 3) + 1), all equal to the negated id."""
    return LogProbs(
        sample_ids=np.array(samples, np.int64),
        log_probs=Jagged.from_rows([np.full(tokens or s % 3 + 1, -s) for s in samples], np.float32),
    )


def values(samples: Sequence[int], version: int = 0) -> Values:
    """A critic's values: each row has (id % 3) + 1 of them, all equal to its id."""
    return Values(
        sample_ids=np.array(samples, np.int64),
        values=Jagged.from_rows([np.full(s % 3 + 1, s) for s in samples], np.float32),
        versions=np.full(len(samples), version, np.int64),
    )


def rollouts(samples: Sequence[int], versions: Sequence[Sequence[int]] | None = None) -> Rollouts:
    """Responses whose tokens equal id % 50, one per entry of `versions` (default: two of version 0 per sample)."""
    tokens = [list(v) for v in versions] if versions is not None else [[0, 0] for _ in samples]
    responses = Jagged.from_rows([np.full(len(v), s % 50) for s, v in zip(samples, tokens, strict=True)], np.int32)
    return Rollouts(
        sample_ids=np.array(samples, np.int64),
        prompts=Jagged.from_rows([[s % 50] for s in samples], np.int32),
        references=Jagged.from_texts([str(s) for s in samples]),
        responses=responses,
        log_probs=responses.with_values(np.zeros(len(responses.values), np.float32)),
        versions=Jagged.from_rows(tokens, np.int32),
        loss_mask=responses.with_values(np.ones(len(responses.values), np.uint8)),
        finishes=np.full(len(samples), Finish.STOP, np.uint8),
    )


def tombstones(samples: Sequence[int], cause: str = "timeout") -> list[Failure]:
    """One failure per sample."""
    return [Failure(s, cause) for s in samples]


def part(batch: Batch) -> ShardRef:
    """A batch packed as the local runtime delivers it: the payload is the frame itself."""
    return pack(LocalStore(), batch, term=0)


def damaged(frame: Frame, at: int = -1) -> Frame:
    """A copy of a frame with one bit flipped (default: in its last row)."""
    copy = frame.copy()
    copy[at] ^= 1
    return copy


def remembered(table: RowTable[Any]) -> int:
    """How many rows have left a table while their prompt is still open."""
    return len(table._left)


def held_bytes(store: LocalStore) -> int:
    """Bytes of the frames in a store's memory that are still referenced."""
    return store._held
