"""Outbox: the deliveries a sender may have to repeat. It keeps each one until the prompts of its rows are finished.

A delivery can't be dropped when its consumer has taken it: if the consumer's process dies, its mailbox is lost, and so
may be the results it made. Once a prompt is trained, dropped or failed, nobody needs its rows. Receivers refuse by id
the rows they had before. Pure: the outbox holds references to rows, and sends nothing itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Generic, TypeVar

import msgspec

from asyncflow.services.channels.finished_prompts import FinishedPrompts
from asyncflow.services.channels.shard_refs import ShardRef
from protocols.control.delivery import Delivery
from protocols.data.ids import prompt_of

S = TypeVar("S")


class OutboxEntry(msgspec.Struct, frozen=True):
    """A delivery in the outbox."""

    service: str
    delivery: Delivery
    parts: list[ShardRef]

    @property
    def samples(self) -> list[int]:
        """The samples it names: rows with values, and tombstones."""
        alive = [sample for shard in self.delivery.shards for sample in shard.sample_ids]
        return alive + [failure.sample_id for failure in self.delivery.failures]


class Outbox(Generic[S]):
    """Sent deliveries by edge, in the order of sending. The prompts in flight bound its memory."""

    def __init__(self, finished: FinishedPrompts | None = None) -> None:
        self._kept: defaultdict[str, dict[int, S]] = defaultdict(dict)
        self._open: dict[int, tuple[str, set[int]]] = {}  # number -> its edge and the prompts that need it
        self._of_prompt: defaultdict[int, set[int]] = defaultdict(set)
        self._finished = finished if finished is not None else FinishedPrompts()
        self._number = 0

    def __len__(self) -> int:
        return len(self._open)

    def keep(self, edge: str, samples: Iterable[int], sent: S) -> None:
        """Keep what is sent to an edge until the prompts of all its samples are finished."""
        prompts = {p for s in samples if (p := prompt_of(s)) not in self._finished}
        if not prompts:
            return
        number = self._number = self._number + 1
        self._kept[edge][number] = sent
        self._open[number] = (edge, prompts)
        for prompt in prompts:
            self._of_prompt[prompt].add(number)

    def kept(self, edge: str) -> list[S]:
        """All deliveries that an edge may still need, in the order of sending."""
        return list(self._kept.get(edge, {}).values())

    def end(self, prompts: Iterable[int]) -> None:
        """Drop the deliveries that only these prompts needed."""
        for prompt in prompts:
            for number in self._of_prompt.pop(prompt, ()):
                edge, needed = self._open[number]
                needed.discard(prompt)
                if not needed:
                    del self._open[number], self._kept[edge][number]
            self._finished.add(prompt)
