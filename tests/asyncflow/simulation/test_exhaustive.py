"""Small runs in all orders: no state is a deadlock, lies on a cycle or breaks a bound.

`python -m tests.asyncflow.simulation --exhaustive` explores many more configurations.
"""

from __future__ import annotations

import pytest

from tests.asyncflow.simulation import broken
from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.exhaustive import explore
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.watch import Deadlock, Violation

FAILURE, RESTART = Faults(failures=1), Faults(restarts=1)
EVERYTHING = Faults(failures=1, drops=1, restarts=1)


@pytest.mark.parametrize(
    ("config", "states"),
    [
        (Config("ppo", "split", steps=2), 8),
        (Config("ppo", "split", staleness=1, samples=2), 90),
        (Config("ppo", "colocated", staleness=1, prompts=2, samples=2), 1_800),
        (Config("grpo", "split", staleness=1, prompts=2, samples=2), 250),
        (Config("remax", "split", staleness=1, samples=2), 170),
        (Config("safe_rlhf", "colocated", staleness=1, prompts=2), 90),
        (Config("grpo", "split", faults=FAILURE), 100),
        (Config("remax", "split", steps=1, faults=FAILURE), 300),
        (Config("ppo", "colocated", steps=1, faults=RESTART), 350),
    ],
    ids=str,
)
def test_every_order(config: Config, states: int):
    """The whole space is explored. If it has fewer states than listed, choices were lost."""
    explored = explore(config)
    assert explored.complete
    assert explored.states >= states
    assert explored.ends >= 1


def test_an_exploration_that_reaches_its_limit_is_not_complete():
    """It does not continue from the other starts, because states left on the path would look like cycles."""
    explored = explore(Config("grpo", "colocated", steps=1, faults=EVERYTHING), most_states=150)
    assert (explored.complete, explored.states) == (False, 150)


def test_an_order_with_an_error_is_found():
    with pytest.raises(Deadlock):
        explore(Config("grpo", steps=1, faults=FAILURE), Rules(tombstones=False))
    with pytest.raises(Deadlock):
        explore(Config("remax", staleness=1), Rules(join_room=broken.credit(1)))
    with pytest.raises(Violation, match=r"mixed|leak"):
        explore(Config("grpo", steps=1, faults=RESTART), Rules(new_attempts=False))
