"""`Channel`: what one stage sends, for a reader outside of the run, who holds nothing up."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from protocols.data.columns import Batch


class ChannelLink(Protocol):
    """The way to a run's channels."""

    def subscribe(self, channel: str) -> AsyncGenerator[tuple[Batch | None, int]]:
        """Batches and the rows that were missed before each; None where rows were missed and nothing follows yet."""
        ...


class Channel:
    """One stage's output. `async for batch in run.channel("policy.generate#1").subscribe()` reads along."""

    def __init__(self, link: ChannelLink, name: str) -> None:
        self.name = name  # of a stage, or of a message that only one stage sends
        self.missed = 0  # rows that its readers were too slow for, or that could not be read
        self._link = link

    async def subscribe(self) -> AsyncGenerator[Batch]:
        """Everything that the stage sends from now on, until the run is over: typed, read-only batches.

        The run never waits for its readers. A slow one loses the oldest rows, counted in `missed`; one that asks for
        nothing for a minute is forgotten. Rows that failed have no values, so they are not here; rows that had to be
        made again come again. Leaving the `async for` ends the subscription.

        Raises BadInput, naming what is known, for a name that is nobody's or several stages'.
        """
        async with aclosing(self._link.subscribe(self.name)) as batches:
            async for batch, missed in batches:
                self.missed += missed
                if batch is not None:
                    yield batch
