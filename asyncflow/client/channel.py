"""Channel: an external reader's subscription to the messages of one stage."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the client of a remote run starts without numpy
    from protocols.data.columns import Batch


class ChannelLink(Protocol):
    """The connection to a run's channels."""

    def subscribe(self, channel: str) -> AsyncGenerator[tuple[Batch | None, int]]:
        """Yield batches and how many rows were missed before each; None: rows were missed, and none follow yet."""
        ...


class Channel:
    """The output of one stage: `async for batch in run.channel("policy.generate#1").subscribe()`."""

    def __init__(self, link: ChannelLink, name: str) -> None:
        self.name = name  # of a stage, or of a message that only one stage sends
        self.missed = 0  # rows that a reader was too slow for, or that could not be read
        self._link = link

    async def subscribe(self) -> AsyncGenerator[Batch]:
        """Yield what the stage sends from now on until the run ends, as typed, read-only batches.

        The run never waits for its readers. A slow reader loses the oldest rows, which `missed` counts; a reader that
        does not poll for a minute is dropped. Rows that failed have no values and are left out; rows that are computed
        again are yielded again. Leaving the `async for` ends the subscription.

        Raises BadInput, with the known names, for an unknown name or a message that several stages send.
        """
        async with aclosing(self._link.subscribe(self.name)) as batches:
            async for batch, missed in batches:
                self.missed += missed
                if batch is not None:
                    yield batch
