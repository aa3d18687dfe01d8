"""The planning benchmark measures every size and reports the bounds. How fast it was is for people to read."""

from __future__ import annotations

import pytest

from asyncflow.bench.planning import QUICK, SearchTiming, enumerated, measure, measured_searches, run
from tests.asyncflow.planner.search import paper_search


def lines(*seconds: tuple[int, float]) -> list[str]:
    return measured_searches([SearchTiming(4, devices, taken, 0.0, 1) for devices, taken in seconds]).lines


@pytest.mark.parametrize(("models", "devices"), [(1, 5), (3, 6), (4, 9)])
def test_the_splits_are_those_that_the_paper_enumerates(models: int, devices: int):
    splits = (
        sizes
        for sets in paper_search.partitions(range(models))
        for sizes in paper_search.splits(devices, len(sets))
        if sum(sizes) == devices
    )
    assert sum(1 for _ in splits) == enumerated(models, devices)


def test_every_size_is_searched_and_simulated():
    searches, simulations = measure(QUICK)
    assert [(one.models, one.devices) for one in searches] == [(4, 16), (4, 32)]
    assert [one.devices for one in simulations] == [32]
    assert all(one.steps > 5 for one in simulations)
    assert len(run(quick=True).rows) == 3


def test_growth_is_reported_as_a_power_of_the_devices_and_bounds_as_met_or_not():
    first, second = lines((64, 0.5), (128, 2.0))
    assert "grows" not in first and "grows as N^2.0" in second and "over 1 s" in second
    assert "within 1 s" in lines((128, 0.9))[0]
