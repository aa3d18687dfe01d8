"""LostRows: how often a row's bytes were lost. A lost row is sent again, but at most MOST_TIMES.

The replacement of a dead sender sends rows that can be read. A sender that lives, but whose frame is lost, would send
the same dead reference for ever, and the row's step would wait until the watchdog ends the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from protocols.data.ids import prompt_of
from protocols.stage import Failure

MOST_TIMES = 5  # more often than processes die while they hold one row


class LostRows:
    """How often each stage lost each row, for the prompts that are not finished."""

    def __init__(self) -> None:
        self._times: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        """The number of rows with a count."""
        return len(self._times)

    def note(self, stage: str, samples: Sequence[int]) -> tuple[list[int], list[Failure]]:
        """Count lost rows. Returns those to send again, and tombstones for those that were lost too often."""
        self._times.update((stage, sample) for sample in samples)
        again = [s for s in samples if self._times[stage, s] < MOST_TIMES]
        over = [s for s in samples if self._times[stage, s] >= MOST_TIMES]
        return again, [Failure(s, f"its bytes were gone {MOST_TIMES} times") for s in over]

    def end(self, prompts: Iterable[int]) -> None:
        """These prompts are finished: forget their rows."""
        finished = set(prompts)
        for key in [key for key in self._times if prompt_of(key[1]) in finished]:
            del self._times[key]
