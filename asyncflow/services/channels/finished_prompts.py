"""FinishedPrompts: the ids of all finished prompts, in bounded memory. Rows of a finished prompt are refused."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class FinishedPrompts:
    """A set of prompt ids, stored as runs. Prompts finish roughly in id order, so there are few runs."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []  # exclusive; runs never touch each other

    def __contains__(self, prompt: int) -> bool:
        at = bisect_right(self._starts, prompt) - 1
        return at >= 0 and prompt < self._stops[at]

    def __len__(self) -> int:
        """The number of runs of consecutive ids, to which the memory is proportional."""
        return len(self._starts)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """All ids as [start, stop) runs, in rising order."""
        return list(zip(self._starts, self._stops, strict=True))

    def add_run(self, start: int, stop: int) -> None:
        """Add the ids of [start, stop)."""
        first = bisect_left(self._stops, start)  # merge with the runs that touch or overlap it
        last = bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def add(self, prompt: int) -> None:
        """Add one id. Idempotent."""
        if prompt not in self:
            self.add_run(prompt, prompt + 1)
