"""Exhaustive exploration: every state that a small configuration can reach, or a subset that shows the same errors.

`explore` tries every action in every state; if one action is free (see `reduction`), it tries only that one. States
that differ only in names count as one (see `fingerprint`). A state that is left in several ways is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from asyncflow.control.device_lease import shared_leases
from protocols.data.ids import prompt_id, prompt_of, sample_id
from tests.asyncflow.simulation.configuration import Config
from tests.asyncflow.simulation.fingerprint import fingerprint, like_enough
from tests.asyncflow.simulation.fork import fork
from tests.asyncflow.simulation.network import Action
from tests.asyncflow.simulation.reduction import explores, free_action, free_race
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.schedulers import Livelock, most_actions
from tests.asyncflow.simulation.turns import open_leases
from tests.asyncflow.simulation.world import THE_REAL_RULES, World


class Explored(msgspec.Struct):
    """The size of the explored space."""

    states: int = 0
    transitions: int = 0
    ends: int = 0  # states in which the run has ended
    fates: set[tuple[int, str]] = msgspec.field(default_factory=set)  # (version, how a prompt ended then)
    ages: set[tuple[int, int]] = msgspec.field(default_factory=set)  # (step, age in versions of a prompt in its batch)
    complete: bool = True


def in_any_turn(config: Config, rules: Rules) -> Rules:
    """The rules with leases that may grant any claim, if the reduction applies then."""
    opened = msgspec.structs.replace(rules, leases=open_leases)
    return opened if rules.leases is shared_leases and explores(next(starts(config, opened))) else rules


class Asymmetry(Exception):
    """The batcher chooses by id between prompts that are not interchangeable, so ids may not be left out."""


class _Place(msgspec.Struct):
    """A state on the path to the current one."""

    name: int
    world: World
    choices: list[Action]  # not yet tried


class Explorer:
    """Depth-first search over the states of one configuration."""

    def __init__(self, config: Config, rules: Rules = THE_REAL_RULES, *, reduced: bool = True) -> None:
        self._config, self._rules, self._reduced = config, in_any_turn(config, rules) if reduced else rules, reduced
        self._seen: set[int] = set()
        self._path: list[_Place] = []
        self._on_path: set[int] = set()  # their names
        self.result = Explored()

    def run(self, most_states: int) -> Explored:
        """Visit every state, or at most `most_states`. Raises what the world raises; a cycle is a Livelock."""
        for world in starts(self._config, self._rules) if self._reduced else [World(self._config, self._rules)]:
            self._arrive(world)
            while self._path:
                self._go_on()
                if self.result.states >= most_states:
                    self.result.complete = False
                    return self.result
        return self.result

    def _go_on(self) -> None:
        place = self._path[-1]
        if not place.choices:
            self._on_path.remove(self._path.pop().name)
            return
        action = place.choices.pop()
        world = fork(place.world) if place.choices else place.world
        world.apply(action)
        self.result.transitions += 1
        self._arrive(world)

    def _arrive(self, world: World) -> None:
        """Go on to the next state that has a choice, and add it if it is new."""
        actions = world.actions()
        alone = most_actions(world)
        while self._reduced and (free := free_action(world, actions)) is not None:
            world.apply(free)
            self.result.transitions += 1
            actions = world.actions()
            alone -= 1
            if not alone:
                raise Livelock(f"livelock: {free} and other free actions go on forever")
        self.result.fates |= world.watch.fates
        self.result.ages |= world.watch.ages
        state = fingerprint(world)
        if state.name in self._on_path:
            raise Livelock("livelock: the run comes back to an earlier state")
        if state.name in self._seen:
            return
        if not like_enough(world, state):
            raise Asymmetry(f"{self._config}: prompts that are equally old are not interchangeable")
        self._seen.add(state.name)
        self.result.states += 1
        if not actions:
            self.result.ends += 1
            world.check_end()
        race = free_race(world, actions) if self._reduced else []
        self._path.append(_Place(state.name, world, race or actions + world.faults()))
        self._on_path.add(state.name)


def starts(config: Config, rules: Rules) -> Iterator[World]:
    """A world for each row that may fail and each process that may die, or one world without faults."""
    for doomed in [set[tuple[str, int]](), *_dooms(config, rules)]:
        first = World(config, rules)
        for victim in first.mortal() if config.faults.restarts == 1 else [""]:
            world = World(config, rules)
            world.doomed, world.fated = set(doomed), {prompt_of(sample) for _, sample in doomed}
            world.victim = victim
            world.faults_left["failures"] = 0
            yield world


def _dooms(config: Config, rules: Rules) -> Iterator[set[tuple[str, int]]]:
    """Every single failure: each row at each of its stages, of every prompt that a run can admit."""
    if not config.faults.failures:
        return
    assert (config.faults.failures, config.turns) == (1, 1), "only one failure, and of a one-step row, is known"
    calm = World(msgspec.structs.replace(config, faults=type(config.faults)()), rules)
    worked: dict[tuple[str, int], None] = {}
    while actions := calm.actions():
        calm.apply(actions[0])
        worked |= dict.fromkeys(calm.rows_at_work())
    first = prompt_of(next(iter(worked))[1])
    parts = {(where, sample - sample_id(first, 0)) for where, sample in worked if prompt_of(sample) == first}
    for ordinal in range(config.steps * config.prompts + config.faults.drops):
        yield from ({(where, sample_id(prompt_id(0, ordinal), 0) + index)} for where, index in sorted(parts))


def explore(
    config: Config, rules: Rules = THE_REAL_RULES, *, reduced: bool = True, most_states: int = 1_000_000
) -> Explored:
    """See `Explorer.run`."""
    return Explorer(config, rules, reduced=reduced).run(most_states)
