"""Schedulers: they decide which possible event happens next."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from tests.asyncflow.simulation.network import Action
from tests.asyncflow.simulation.watch import Violation
from tests.asyncflow.simulation.world import World

ACTIONS_PER_ROW = 400  # far more than any row needs: a run with more actions is livelocked


class Livelock(Violation):
    """The run goes on without coming nearer to its end."""


def most_actions(world: World) -> int:
    """The number of actions after which a run counts as livelocked."""
    config = world.config
    rows = (config.steps + config.staleness + 1) * config.prompts * config.rows_per_prompt
    return 1000 + ACTIONS_PER_ROW * (rows + sum(getattr(config.faults, f) for f in config.faults.__struct_fields__))


def run(world: World, choose: Callable[[list[Action]], Action], chance: random.Random, fault_rate: float) -> World:
    """Run a world to its end. Raises Deadlock or Violation."""
    left = most_actions(world)
    while actions := world.actions():
        if fault_rate and chance.random() < fault_rate and (faults := world.faults()):
            world.apply(_one_of(faults, chance))
        else:
            world.apply(choose(actions))
        left -= 1
        if left < 0:
            raise Livelock(f"livelock: {most_actions(world)} actions at version {world.controller.version}")
    world.check_end()
    return world


def in_any_order(world: World, seed: int, fault_rate: float = 0.0) -> World:
    """Every possible action is equally likely."""
    chance = random.Random(seed)
    return run(world, chance.choice, chance, fault_rate)


def by_durations(world: World, seed: int, fault_rate: float = 0.0, spread: float = 1.0) -> World:
    """Actions have durations with long tails, and each service is faster or slower by up to 10 ** spread."""
    chance = random.Random(seed)
    clock = Clock(chance, {name: 10 ** chance.uniform(-spread, spread) for name in sorted(world.services)})
    return run(world, clock.next, chance, fault_rate)


Chosen = Callable[[World, Action], bool]


def never(world: World, action: Action) -> bool:
    """Chooses no action."""
    return False


def directed(world: World, seed: int, late: Chosen = never, strike: Chosen = never) -> World:
    """Any order, but `late` events happen only when nothing else can, and the fault `strike` as soon as it can."""
    chance = random.Random(seed)

    def choose(actions: list[Action]) -> Action:
        if strike is not never and (faults := [f for f in world.faults() if strike(world, f)]):
            return faults[0]
        return chance.choice([a for a in actions if not late(world, a)] or actions)

    return run(world, choose, chance, 0.0)


class Clock:
    """Virtual time: each action gets a duration when it becomes possible, and the earliest to end happens."""

    def __init__(self, chance: random.Random, pace: Mapping[str, float]) -> None:
        self._chance, self._pace = chance, pace
        self._due: dict[Action, float] = {}
        self.now = 0.0

    def next(self, actions: list[Action]) -> Action:
        """The action whose time comes first."""
        due = {a: self._due.get(a) or self.now + self._duration(a) for a in actions}
        action = min(due, key=due.__getitem__)
        self.now = max(self.now, due.pop(action))
        self._due = due
        return action

    def _duration(self, action: Action) -> float:
        if action.verb in ("take", "ask", "send", "admit", "close", "hear", "commit"):
            return 1e-3 * self._chance.random()
        tail = 30 if self._chance.random() < 0.05 else 1
        base = 0.1 if action.verb in ("deliver", "end", "resend") else 1.0
        service = action.who.split("/")[0].split(".")[0]
        return base * tail * self._chance.uniform(0.1, 2.0) * self._pace.get(service, 1.0)


def _one_of(faults: list[Action], chance: random.Random) -> Action:
    """Choose the kind of fault first, because there are many more rows that can fail than services that can die."""
    kinds = sorted({f.verb for f in faults})
    kind = chance.choice(kinds)
    return chance.choice([f for f in faults if f.verb == kind])
