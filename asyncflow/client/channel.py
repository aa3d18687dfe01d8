"""Channel: an external reader's subscription to the messages of one stage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from protocols.data.columns import Batch


class Channel:
    """The output of one stage: `async for batch in run.channel("policy.generate#1").subscribe()`."""

    def __init__(self, name: str, follow: Callable[[], AsyncGenerator[tuple[Batch | None, int]]]) -> None:
        """`follow` yields batches and how many rows were missed before each; None: missed rows, and no batch yet."""
        self.name = name  # of a stage, or of a message that only one stage sends
        self.missed = 0  # rows that a reader was too slow for, or that could not be read
        self._follow = follow

    async def subscribe(self) -> AsyncGenerator[Batch]:
        """Yield what the stage sends from now on until the run ends, as typed, read-only batches.

        The run never waits for its readers. A slow reader loses the oldest rows, which `missed` counts; a reader that
        does not poll for a minute is dropped. Rows that failed have no values and are left out; rows that are computed
        again are yielded again. Leaving the `async for` ends the subscription.
        """
        async with aclosing(self._follow()) as batches:
            async for batch, missed in batches:
                self.missed += missed
                if batch is not None:
                    yield batch
