"""Small runs in all orders: no state of them is a deadlock, none is on a circle, and none breaks a bound.

Larger ones: `python -m tests.asyncflow.simulation --exhaustive`.
"""

from __future__ import annotations

import pytest

from tests.asyncflow.simulation import broken
from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.exhaustive import AtOnce, all_but_work, explore, nothing, what_is_local
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.watch import Deadlock, Violation

FAILURE, DUPLICATE, RESTART = Faults(failures=1), Faults(duplicates=1), Faults(restarts=1)
EVERYTHING = Faults(failures=1, drops=1, restarts=1)


@pytest.mark.parametrize(
    ("config", "states"),
    [
        (Config("ppo", "split", steps=1), 300),
        (Config("ppo", "colocated", steps=1), 300),
        (Config("remax", "split", steps=1), 500),
        (Config("remax", "colocated", steps=1), 500),
    ],
    ids=str,
)
def test_every_order_of_one_step(config: Config, states: int):
    check(config, nothing, states)


@pytest.mark.parametrize(
    ("config", "states"),
    [
        (Config("ppo", "split", steps=2), 250),
        (Config("ppo", "colocated", steps=2), 300),
        (Config("ppo", "split", steps=1, faults=FAILURE), 700),
        (Config("ppo", "split", steps=1, faults=DUPLICATE), 1200),
        (Config("ppo", "colocated", steps=1, faults=RESTART), 1600),
        (Config("remax", "colocated", steps=1, faults=FAILURE), 500),
    ],
    ids=str,
)
def test_every_order_of_deliveries_and_work_with_a_fault_at_any_point(config: Config, states: int):
    check(config, what_is_local, states)


@pytest.mark.parametrize(
    ("config", "states"),
    [
        (Config("ppo", "split", steps=2, faults=RESTART), 800),
        (Config("ppo", "split", steps=2, staleness=1), 300),
        (Config("ppo", "colocated", steps=1, faults=EVERYTHING), 500),
        (Config("remax", "colocated", steps=1, faults=EVERYTHING), 700),
        (Config("ppo", "colocated", steps=2, staleness=1, prompts=2), 600),
        (Config("remax", "colocated", steps=1, prompts=2, samples=2), 350),
        (Config("remax", "split", steps=2, staleness=1), 800),
    ],
    ids=str,
)
def test_every_order_of_work_with_faults_at_any_point(config: Config, states: int):
    check(config, all_but_work, states)


def check(config: Config, at_once: AtOnce, states: int) -> None:
    """The whole space is seen; one that has shrunk has lost choices."""
    explored = explore(config, at_once=at_once)
    assert explored.complete
    assert explored.states >= states
    assert explored.ends >= 1


@pytest.mark.parametrize("at_once", [what_is_local, all_but_work], ids=lambda level: level.__name__)
def test_what_happens_at_once_hides_no_deadlock(at_once: AtOnce):
    with pytest.raises(Deadlock):
        explore(Config("remax", staleness=1), Rules(join_room=broken.credit(1)), at_once)


def test_an_order_that_goes_wrong_is_found():
    with pytest.raises(Deadlock):
        explore(Config("grpo", steps=1, faults=FAILURE), Rules(tombstones=False))
    with pytest.raises(Violation, match=r"mixed|leak"):
        explore(Config("grpo", steps=1, faults=RESTART), Rules(new_attempts=False), what_is_local)
