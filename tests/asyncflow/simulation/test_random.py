"""Random configurations run without deadlock or livelock; no row is lost, duplicated, too old, out of bounds or leaked.

`python -m tests.asyncflow.simulation N` runs N configurations; a failing one is reproduced by its seed.
"""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from tests.asyncflow.simulation.algorithms import ALGORITHMS
from tests.asyncflow.simulation.configuration import Layout
from tests.asyncflow.simulation.randomly import FAULTS, Result, configuration, result_of, table

RUNS = 400


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [result_of(seed) for seed in range(RUNS)]


def test_nothing_goes_wrong(results: list[Result]):
    assert [(r.seed, r.wrong) for r in results if r.wrong] == [], table(results)


def test_the_runs_differ_in_everything_that_counts(results: list[Result]):
    """A simulation that never meets a fault or a bound would prove nothing."""
    counts = sum((r.counts for r in results), Counter[str]())
    assert all(counts[fault] for fault in FAULTS), counts
    assert {r.config.algorithm for r in results} == set(ALGORITHMS)
    assert {r.config.layout for r in results} == set(get_args(Layout))
    assert {r.config.staleness for r in results} == {0, 1, 2, 3}
    met = {what for r in results for what, (value, limit) in r.nearest.items() if value == limit}
    assert met >= {"N_r", "staleness", "mailbox", "generating", "join, incomplete", "join, all"}


def test_a_run_is_repeated_by_its_seed():
    assert configuration(7) == configuration(7)
    assert result_of(7).counts == result_of(7).counts
