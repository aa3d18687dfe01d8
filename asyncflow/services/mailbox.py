"""Mailboxes join rows by id. A plain one (one edge) gives credit; a join never refuses.

A join's memory is bounded at the source instead: a prompt is admitted only while fewer than a window of
prompts are unsettled. With credits per edge a join can wait for the row that the full edge keeps out.
"""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec
import numpy as np

from protocols.columns import Batch, concat, take
from protocols.stage import Failure

Held = tuple[Batch, int]  # a row inside a batch that arrived


class DuplicateRow(Exception):
    """A row arrived twice on one edge."""


class Firing(msgspec.Struct):
    """What a stage takes at once: joined inputs with the same ids in the same order, and tombstones."""

    inputs: tuple[Batch, ...]  # empty where only tombstones arrived
    failures: list[Failure]

    def __len__(self) -> int:
        return len(self.inputs[0]) if self.inputs else 0


class RowTable:
    """Rows by id until every edge has brought theirs: pure bookkeeping, no waiting.

    A row is settled when each edge brought a value or a tombstone; it is dead if any was a tombstone.
    """

    def __init__(self, edges: int) -> None:
        self._edges = edges
        self._held: dict[int, dict[int, Held | Failure]] = {}
        self._settled: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def settled(self) -> int:
        return len(self._settled)

    def arrive(self, position: int, batch: Batch | None, failures: list[Failure]) -> list[int]:
        """Take rows of one edge; the ids that settled by it. Raises DuplicateRow."""
        rows: list[tuple[int, Held | Failure]] = [(f.sample_id, f) for f in failures]
        if batch is not None:
            rows += [(int(sample), (batch, row)) for row, sample in enumerate(batch.sample_ids.tolist())]
        settled = [sample for sample, value in rows if self._place(position, sample, value)]
        self._settled.extend(settled)
        return settled

    def _place(self, position: int, sample: int, value: Held | Failure) -> bool:
        slots = self._held.setdefault(sample, {})
        if position in slots:
            raise DuplicateRow(f"sample {sample} arrived twice on input {position}")
        slots[position] = value
        return len(slots) == self._edges

    def next_settled(self, most: int, in_id_order: bool = False) -> list[int]:
        """Take up to `most` settled ids off the queue, oldest arrival first."""
        ids = [self._settled.popleft() for _ in range(min(most, len(self._settled)))]
        return sorted(ids) if in_id_order else ids

    def failure_of(self, sample: int) -> Failure | None:
        """Why a settled row is dead, or None."""
        return next((v for v in self._held[sample].values() if isinstance(v, Failure)), None)

    def column(self, position: int, samples: list[int]) -> Batch:
        """The rows of one edge, in the order of `samples`, without taking them out."""
        held = [self._held[s][position] for s in samples]
        return _gather([h for h in held if not isinstance(h, Failure)])

    def remove(self, samples: list[int]) -> None:
        """Let go of rows."""
        for sample in samples:
            del self._held[sample]

    def fire(self, samples: list[int]) -> Firing:
        """Take settled rows out: values joined, dead rows as one tombstone each."""
        dead = {s: f for s in samples if (f := self.failure_of(s)) is not None}
        alive = [s for s in samples if s not in dead]
        inputs = tuple(self.column(p, alive) for p in range(self._edges)) if alive else ()
        self.remove(samples)
        return Firing(inputs, list(dead.values()))


def _gather(held: list[Held]) -> Batch:
    """Rows of several batches as one, in order; runs of one batch are cut out together."""
    parts: list[Batch] = []
    start = 0
    for end in range(1, len(held) + 1):
        if end == len(held) or held[end][0] is not held[start][0]:
            parts.append(take(held[start][0], np.array([row for _, row in held[start:end]])))
            start = end
    return concat(parts)


class Mailbox:
    """A stage's inputs. `put` waits for room where there is one edge; `take` waits for rows, never for a minimum."""

    def __init__(self, edges: int, capacity: int, in_id_order: bool = False) -> None:
        self._table = RowTable(edges)
        self._capacity = capacity if edges == 1 else None
        self._in_id_order = in_id_order
        self._changed = asyncio.Condition()
        self.peak = 0

    @property
    def depth(self) -> int:
        """Rows held."""
        return len(self._table)

    @property
    def capacity(self) -> int:
        """Rows that fit, 0 for a join, which never refuses."""
        return self._capacity or 0

    async def put(self, position: int, batch: Batch | None, failures: list[Failure]) -> None:
        """Hand rows in. A delivery larger than the capacity is let into an empty mailbox."""
        count = len(failures) + (len(batch) if batch is not None else 0)
        async with self._changed:
            if self._capacity is not None:
                room = self._capacity
                await self._changed.wait_for(lambda: not self.depth or self.depth + count <= room)
            self._table.arrive(position, batch, failures)
            self.peak = max(self.peak, self.depth)
            self._changed.notify_all()

    async def take(self, most: int) -> Firing:
        """Whatever is settled, up to `most` rows."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._table.settled > 0)
            firing = self._table.fire(self._table.next_settled(most, self._in_id_order))
            self._changed.notify_all()
            return firing
