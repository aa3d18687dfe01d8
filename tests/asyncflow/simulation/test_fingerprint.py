"""States with equal fingerprints behave alike: they allow the same events, which lead to equal fingerprints."""

from __future__ import annotations

import pytest

from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.exhaustive import in_any_turn, starts
from tests.asyncflow.simulation.fingerprint import fingerprint
from tests.asyncflow.simulation.fork import fork
from tests.asyncflow.simulation.world import THE_REAL_RULES, World


def next_states(world: World) -> dict[int, World]:
    """The states that one event leads to, by name."""
    found: dict[int, World] = {}
    for action in world.actions() + world.faults():
        later = fork(world)
        later.apply(action)
        found[fingerprint(later).name] = later
    return found


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (Config("ppo", "split", prompts=2, samples=2, staleness=1), 80),
        (Config("ppo", "colocated", prompts=2, samples=2, staleness=1), 80),
        (Config("remax", "colocated", prompts=2, samples=2, staleness=1, firing_rows=2), 200),
        (Config("grpo", "mixed", prompts=2, samples=2, steps=1, firing_rows=2, faults=Faults(drops=1)), 80),
        (Config("grpo", "split", samples=2, steps=1, faults=Faults(failures=1)), 60),
        (Config("grpo", "colocated", samples=2, steps=1, faults=Faults(restarts=1)), 60),
    ],
    ids=str,
)
def test_what_can_happen_next_is_the_same_in_states_of_one_name(config: Config, most: int):
    met_again = 0
    for first in starts(config, in_any_turn(config, THE_REAL_RULES)):
        ahead, follow = [(fingerprint(first).name, first)], dict[int, set[int]]()
        while ahead and len(follow) < most:
            name, world = ahead.pop()
            later = next_states(world)
            if name in follow:
                met_again += 1
                assert follow[name] == later.keys()
            else:
                follow[name] = set(later)
                ahead += later.items()
    assert met_again


def test_it_counts_which_prompt_will_fail_before_any_is_admitted():
    config = Config("grpo", steps=2, prompts=2, faults=Faults(failures=1))
    worlds = list(starts(config, THE_REAL_RULES))
    assert len({fingerprint(world).name for world in worlds}) == len(worlds)
