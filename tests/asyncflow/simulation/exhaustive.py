"""All orders: every state that a small configuration can reach, each looked at once.

A state is kept as the actions that lead to it: the real objects need no copying, they are led there again.

Where that is too many states, some actions happen as soon as they can. That leaves out no deadlock: such an action
is enabled by another one, nothing but the death of its process disables it, and done late it is what the other
one done late would be (a row that is delivered late is as good as one that is taken late). What it does leave out
is how many rows gather for one firing, and the deaths in between; the random runs have those.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tests.asyncflow.simulation.configuration import Config
from tests.asyncflow.simulation.fingerprint import fingerprint
from tests.asyncflow.simulation.network import Action
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.schedulers import Livelock
from tests.asyncflow.simulation.world import THE_REAL_RULES, World

AtOnce = Callable[[Action], bool]


def nothing(action: Action) -> bool:
    """Every action waits for its turn: the whole state space."""
    return False


def what_is_local(action: Action) -> bool:
    """What a process does with what it has: to look, to ask, to send, to forget."""
    return action.verb in ("hear", "end", "take", "ask", "send", "resend", "publish")


def all_but_work(action: Action) -> bool:
    """And what is sent arrives: only work takes its time."""
    return what_is_local(action) or action.verb == "deliver"


class Explored(msgspec.Struct):
    """How much there was to see."""

    states: int = 0
    transitions: int = 0
    ends: int = 0  # states in which the run is over
    complete: bool = True


class _Place(msgspec.Struct):
    """A state on the way to the current one."""

    state: int
    came_by: list[Action]  # the action that was chosen, and what happened at once
    choices: list[Action]  # not yet tried


class Explorer:
    """Depth first over one configuration."""

    def __init__(self, config: Config, rules: Rules = THE_REAL_RULES, at_once: AtOnce = nothing) -> None:
        self._config, self._rules, self._at_once = config, rules, at_once
        self._seen: set[int] = set()
        self._way: list[_Place] = []
        self.result = Explored()

    def run(self, most_states: int) -> Explored:
        """Look at every state, or at so many. Raises what the world raises; a circle of states is a Livelock."""
        world: World | None = World(self._config, self._rules)
        self._arrive(world, self._rush(world))
        while self._way:
            if not self._way[-1].choices:
                self._way.pop()
                world = None
                continue
            action = self._way[-1].choices.pop()
            world = world or self._lead_there()
            world.apply(action)
            self.result.transitions += 1
            if not self._arrive(world, [action, *self._rush(world)]):
                world = None
            elif len(self._seen) >= most_states:
                self.result.complete = False
                break
        return self.result

    def _arrive(self, world: World, came_by: list[Action]) -> bool:
        """Take a state in; whether it is new."""
        state = fingerprint(world)
        if any(place.state == state for place in self._way):
            raise Livelock(f"livelock: {came_by[0]} leads back to where the run was")
        if state in self._seen:
            return False
        self._seen.add(state)
        self.result.states += 1
        actions = world.actions()
        if not actions:
            self.result.ends += 1
            world.check_end()
        self._way.append(_Place(state, came_by, actions + world.faults()))
        return True

    def _lead_there(self) -> World:
        world = World(self._config, self._rules)
        for place in self._way:
            for action in place.came_by:
                world.apply(action)
        return world

    def _rush(self, world: World) -> list[Action]:
        """Let happen what happens at once, in a fixed order; what did."""
        rushed = []
        while (action := next(filter(self._at_once, world.actions()), None)) is not None:
            world.apply(action)
            rushed.append(action)
        return rushed


def explore(
    config: Config, rules: Rules = THE_REAL_RULES, at_once: AtOnce = nothing, most_states: int = 1_000_000
) -> Explored:
    """See `Explorer.run`."""
    return Explorer(config, rules, at_once).run(most_states)
