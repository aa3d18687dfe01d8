"""The benchmark of the channels runs and reports every figure. How fast it was is for people to read."""

from __future__ import annotations

import pytest

from asyncflow.bench import scale
from asyncflow.bench.channels import QUICK, RANKS, measure


async def test_every_row_passes_few_services_and_many_and_nothing_is_left():
    few, many = [await scale.measure(services, rows=30_000) for services in (4, 64)]
    assert (few.channels, many.channels) == (8, 128)
    for figures in (few, many):
        assert figures.rows >= 16_384
        assert figures.most_held <= scale.WAVE, "a join holds at most the rows of one wave"
        assert figures.most_kept == 0, "finished prompts are forgotten"


@pytest.mark.ray
async def test_every_figure_is_reported_beside_its_bound():
    rows, lines = await measure(QUICK)
    found = {row.name: row for row in rows}
    assert found["coordinator"].value == 0
    read = [row for name, row in found.items() if name.startswith("read by rank")]
    assert len(read) == RANKS
    assert all(row.value > 0 and row.bound for row in read)
    assert [name for name in found if name.startswith("hop")] == ["hop, 1 ranks", f"hop, {RANKS} ranks"]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        *("batch", "hop", "hop", "large"),
        *["scale"] * 3,
    ]
