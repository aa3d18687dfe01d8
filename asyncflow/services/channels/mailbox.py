"""Mailboxes: a stage's inputs, joined by id. A plain one (one edge) gives credit; a join never refuses.

A join's memory is bounded at the source instead: a prompt is admitted only while fewer than a window of
prompts are unsettled. With credits per edge a join can wait for the row that the full edge keeps out.
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
    """Whether a delivery is let in. One that can never fit is let into an empty mailbox."""
    return not arriving or not held or held + arriving <= capacity


class Mailbox(Generic[V]):
    """`put` waits for room where there is one edge; `take` waits for rows, never for a minimum."""

    def __init__(
        self, edges: int, capacity: int, in_id_order: bool = False, ended: FinishedPrompts | None = None
    ) -> None:
        self._table: RowTable[V] = RowTable(edges, ended)
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

    async def put(self, position: int, rows: Sequence[tuple[int, V | Failure]], attempt: int = 0) -> Arrival:
        """Hand rows of one edge in; returns when there was room for those that are new."""
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
        """Whatever is settled, up to `most` rows."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._table.settled > 0)
            joined = self._table.take(self._table.next_settled(most, self._in_id_order))
            self._changed.notify_all()
            return joined

    async def take_back(self, samples: Iterable[int]) -> None:
        """Rows that were taken could not be read: let them be sent again."""
        async with self._changed:
            self._table.take_back(samples)
            self._changed.notify_all()

    async def end(self, prompts: Iterable[int]) -> None:
        """These prompts are over: their rows make room, and what still comes of them is refused."""
        async with self._changed:
            self._table.end(prompts)
            self._changed.notify_all()
