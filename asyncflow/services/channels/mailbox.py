"""Mailbox: the inputs of a stage, joined by sample id, with a bounded number of rows.

A mailbox of one edge gives its senders credit: `put` waits for room. A join of several edges never makes a sender
wait, because it could deadlock: it could wait for the very row that a full edge keeps out. Its memory is bounded at
the source, where a prompt is admitted only while the number of prompts in flight is below the window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from asyncflow.services.channels.finished_prompts import FinishedPrompts
from asyncflow.services.channels.row_table import Arrival, Joined, RowTable
from protocols.stage import Failure

V = TypeVar("V")


def has_room(held: int, arriving: int, capacity: int) -> bool:
    """Whether a delivery fits. One that is larger than the capacity is accepted by an empty mailbox."""
    return not arriving or not held or held + arriving <= capacity


class Mailbox(Generic[V]):
    """`put` waits for room if there is one edge; `take` waits for one row or more."""

    def __init__(
        self, edges: int, capacity: int, in_id_order: bool = False, finished: FinishedPrompts | None = None
    ) -> None:
        self._table: RowTable[V] = RowTable(edges, finished)
        self._capacity = capacity if edges == 1 else None
        self._in_id_order = in_id_order
        self._changed = asyncio.Condition()
        self.peak = 0

    @property
    def depth(self) -> int:
        """The number of rows held."""
        return len(self._table)

    @property
    def capacity(self) -> int:
        """The most rows held; 0 for a join, which has no limit."""
        return self._capacity or 0

    async def put(self, position: int, rows: Sequence[tuple[int, V | Failure]], attempt: int = 0) -> Arrival:
        """Put rows of one edge in; returns when there was room for the new ones."""
        async with self._changed:
            if self._capacity is not None:
                room = self._capacity
                samples = [sample for sample, _ in rows]
                await self._changed.wait_for(
                    lambda: has_room(self.depth, len(self._table.fresh(position, samples, attempt)), room)
                )
            arrival = self._table.arrive(position, rows, attempt)
            self.peak = max(self.peak, self.depth)
            self._changed.notify_all()
            return arrival

    async def take(self, most: int) -> Joined[V]:
        """Take up to `most` complete rows; waits until there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._table.complete > 0)
            joined = self._table.take(self._table.next_complete(most, self._in_id_order))
            self._changed.notify_all()
            return joined

    async def take_back(self, samples: Iterable[int]) -> None:
        """Accept these rows again, because they were taken but could not be read."""
        async with self._changed:
            self._table.take_back(samples)
            self._changed.notify_all()

    async def end(self, prompts: Iterable[int]) -> None:
        """These prompts are finished: drop their rows, and refuse those that still arrive."""
        async with self._changed:
            self._table.end(prompts)
            self._changed.notify_all()
