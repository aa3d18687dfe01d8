"""Settings of what a run shows of itself: generated texts, and the trackers that follow it."""

from __future__ import annotations

from workers.settings import NonNegativeInt, PositiveInt, Settings


class SampleTable(Settings, frozen=True):
    """A table of generated texts with their rewards, in samples.jsonl, in the report and in the trackers."""

    every: NonNegativeInt = 10  # steps from one table to the next, the first of step 1; 0: none
    rows: PositiveInt = 8  # samples of that step, from the worst to the best at equal distances
    characters: PositiveInt = 4000  # most of a prompt, response or reference that are kept: its beginning and its end

    def due(self, step: int) -> bool:
        """Whether a table is made of this step; 1 is the first."""
        return bool(self.every) and (step == 1 or step % self.every == 0)


class Observe(Settings, frozen=True):
    """What a run shows of itself."""

    samples: SampleTable = SampleTable()
