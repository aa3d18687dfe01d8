"""The benchmark of the channels runs and says what it promises; how fast it was is for people to read."""

from __future__ import annotations

import msgspec
import pytest

from asyncflow.bench import scale
from asyncflow.bench.channels import QUICK, RANKS, ChannelFigures, lines, measure


async def test_every_row_passes_few_services_and_many_and_nothing_is_kept():
    few, many = [await scale.measure(services, rows=30_000) for services in (4, 64)]
    assert (few.channels, many.channels) == (8, 128)
    for figures in (few, many):
        assert figures.rows >= 16_384
        assert figures.most_held <= scale.WAVE, "a join holds what one wave brought"
        assert figures.most_kept == 0, "ended prompts are forgotten"


@pytest.mark.ray
async def test_every_figure_is_told_beside_its_bound():
    figures = await measure(QUICK)
    assert msgspec.json.decode(msgspec.json.encode(figures), type=ChannelFigures) == figures
    assert figures.batch.coordinator_bytes == 0
    assert len(figures.batch.read_bytes) == RANKS
    assert [hop.ranks for hop in figures.hops] == [1, RANKS]
    assert [line.split()[0] for line in lines(figures) if not line.startswith(" ")] == [
        *("batch", "hop", "hop", "large"),
        *["scale"] * 3,
    ]
