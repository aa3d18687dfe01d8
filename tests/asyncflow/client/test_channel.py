"""The client of a channel yields batches and counts the rows that it was too slow to receive."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from asyncflow.client.channel import Channel
from protocols.data.columns import Batch
from tests.asyncflow.services import rows


class Link:
    """A fake link with two batches, and with missed rows before and after them."""

    def __init__(self) -> None:
        self.left = 0

    async def subscribe(self, channel: str) -> AsyncGenerator[tuple[Batch | None, int]]:
        try:
            yield rows.scores([1]), 2
            yield rows.scores([2, 3]), 0
            yield None, 5
        finally:
            self.left += 1


async def test_a_reader_gets_the_batches_and_the_channel_counts_what_was_missed():
    channel = Channel(Link(), "scores")
    assert [batch async for batch in channel.subscribe()] == [rows.scores([1]), rows.scores([2, 3])]
    assert channel.missed == 7


async def test_leaving_the_iteration_leaves_the_link():
    link = Link()
    batches = Channel(link, "scores").subscribe()
    assert await anext(batches) == rows.scores([1])
    await batches.aclose()
    assert link.left == 1
