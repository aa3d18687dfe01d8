"""A sender keeps what it sent until the prompts end: whoever restarts behind it can be sent all of it again.

That a consumer took a row is no reason to forget it: its mailbox dies with its process, and what it made of the
row with the next one's. The end of a prompt (trained, dropped, failed) is one, for then nobody needs its rows.
The receivers refuse by id what they had before. Pure: it holds references to rows, and sends nothing itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Generic, TypeVar

from asyncflow.services.channels.finished_prompts import FinishedPrompts
from protocols.data.ids import prompt_of

S = TypeVar("S")


class Outbox(Generic[S]):
    """What left, by edge, in the order of sending; the memory of one is bounded by the prompts in flight."""

    def __init__(self, ended: FinishedPrompts | None = None) -> None:
        self._kept: defaultdict[str, dict[int, S]] = defaultdict(dict)
        self._open: dict[int, tuple[str, set[int]]] = {}  # number -> its edge and the prompts that need it
        self._of_prompt: defaultdict[int, set[int]] = defaultdict(set)
        self._ended = ended if ended is not None else FinishedPrompts()
        self._number = 0

    def __len__(self) -> int:
        return len(self._open)

    def keep(self, edge: str, samples: Iterable[int], sent: S) -> None:
        """Remember what goes to an edge until the prompts of all its samples have ended."""
        prompts = {p for s in samples if (p := prompt_of(s)) not in self._ended}
        if not prompts:
            return
        number = self._number = self._number + 1
        self._kept[edge][number] = sent
        self._open[number] = (edge, prompts)
        for prompt in prompts:
            self._of_prompt[prompt].add(number)

    def kept(self, edge: str) -> list[S]:
        """All that an edge may still need, in the order of sending."""
        return list(self._kept.get(edge, {}).values())

    def end(self, prompts: Iterable[int]) -> None:
        """Let go of what only these prompts needed."""
        for prompt in prompts:
            for number in self._of_prompt.pop(prompt, ()):
                edge, needed = self._open[number]
                needed.discard(prompt)
                if not needed:
                    del self._open[number], self._kept[edge][number]
            self._ended.add(prompt)
