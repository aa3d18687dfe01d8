"""Prompts that are over, in bounded memory: what still comes of them is late."""

from __future__ import annotations

from bisect import bisect_right


class EndedPrompts:
    """A set of prompt ids in as many numbers as it has gaps: prompts end roughly in the order of their ids."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []  # exclusive; runs never touch each other

    def __contains__(self, prompt: int) -> bool:
        at = bisect_right(self._starts, prompt) - 1
        return at >= 0 and prompt < self._stops[at]

    def __len__(self) -> int:
        """Runs of consecutive ids: what it costs."""
        return len(self._starts)

    def add(self, prompt: int) -> None:
        """Add one id; again does nothing."""
        if prompt in self:
            return
        at = bisect_right(self._starts, prompt)
        joins_left = at > 0 and self._stops[at - 1] == prompt
        joins_right = at < len(self._starts) and self._starts[at] == prompt + 1
        if joins_left and joins_right:
            self._stops[at - 1] = self._stops.pop(at)
            del self._starts[at]
        elif joins_left:
            self._stops[at - 1] = prompt + 1
        elif joins_right:
            self._starts[at] = prompt
        else:
            self._starts.insert(at, prompt)
            self._stops.insert(at, prompt + 1)
