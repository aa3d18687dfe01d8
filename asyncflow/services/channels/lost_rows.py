"""Rows whose bytes were gone when somebody was to read them: they are sent again, but not for ever.

A dead sender has a successor, whose rows can be read. Where the sender lives and its frame is gone all the same, it
sends the same reference again, and a row that never comes would hold up its step until the watchdog ends the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from protocols.data.ids import prompt_of
from protocols.stage import Failure

MOST_TIMES = 5  # more than processes die near a row


class LostRows:
    """How often each stage lost each row; of prompts that are not over."""

    def __init__(self) -> None:
        self._times: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        """Rows that are remembered."""
        return len(self._times)

    def note(self, stage: str, samples: Sequence[int]) -> tuple[list[int], list[Failure]]:
        """The rows that are to be sent again, and tombstones for those that were gone too often."""
        self._times.update((stage, sample) for sample in samples)
        again = [s for s in samples if self._times[stage, s] < MOST_TIMES]
        over = [s for s in samples if self._times[stage, s] >= MOST_TIMES]
        return again, [Failure(s, f"its bytes were gone {MOST_TIMES} times") for s in over]

    def end(self, prompts: Iterable[int]) -> None:
        """These prompts are over: forget their rows."""
        ended = set(prompts)
        for place in [place for place in self._times if prompt_of(place[1]) in ended]:
            del self._times[place]
