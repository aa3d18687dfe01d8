"""Small runs in all orders: no state of them is a deadlock, none is on a circle, and none breaks a bound.

Larger ones: `python -m tests.asyncflow.simulation --exhaustive`.
"""

from __future__ import annotations

import pytest

from tests.asyncflow.simulation import broken
from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.exhaustive import explore
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.watch import Deadlock, Violation

FAILURE, RESTART = Faults(failures=1), Faults(restarts=1)


@pytest.mark.parametrize(
    ("config", "states"),
    [
        (Config("ppo", "split", steps=2), 10),
        (Config("ppo", "colocated", steps=2), 20),
        (Config("ppo", "split", steps=2, staleness=1), 25),
        (Config("ppo", "split", steps=2, staleness=1, samples=2), 120),
        (Config("ppo", "split", steps=2, staleness=1, prompts=2), 120),
        (Config("ppo", "colocated", steps=2, staleness=1), 100),
        (Config("remax", "split", steps=1), 5),
        (Config("remax", "split", steps=2, staleness=1), 100),
        (Config("remax", "split", steps=1, faults=FAILURE), 100),
        (Config("ppo", "colocated", steps=1, faults=RESTART), 300),
    ],
    ids=str,
)
def test_every_order(config: Config, states: int):
    """The whole space is seen; one that has shrunk has lost choices."""
    explored = explore(config)
    assert explored.complete
    assert explored.states >= states
    assert explored.ends >= 1


def test_an_order_that_goes_wrong_is_found():
    with pytest.raises(Deadlock):
        explore(Config("grpo", steps=1, faults=FAILURE), Rules(tombstones=False))
    with pytest.raises(Deadlock):
        explore(Config("remax", staleness=1), Rules(join_room=broken.credit(1)))
    with pytest.raises(Violation, match=r"mixed|leak"):
        explore(Config("grpo", steps=1, faults=RESTART), Rules(new_attempts=False))
