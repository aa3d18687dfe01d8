"""The reduction's conditions hold in sampled states, and it finds each error that the full exploration finds."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from asyncflow.control.admission.staleness import StalenessExceeded
from asyncflow.control.device_lease import Claim
from tests.asyncflow.simulation import broken
from tests.asyncflow.simulation.configuration import Config, Faults
from tests.asyncflow.simulation.exhaustive import explore, in_any_turn, starts
from tests.asyncflow.simulation.fingerprint import fingerprint
from tests.asyncflow.simulation.fork import fork
from tests.asyncflow.simulation.network import Action
from tests.asyncflow.simulation.reduction import explores, is_free
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.watch import Deadlock, Violation
from tests.asyncflow.simulation.world import THE_REAL_RULES, World

FAILURE, DROP, RESTART = Faults(failures=1), Faults(drops=1), Faults(restarts=1)


def after(world: World, *actions: Action) -> World:
    """A copy of a world to which these actions were applied."""
    later = fork(world)
    for action in actions:
        later.apply(action)
    return later


def finishing(world: World) -> list[Action]:
    return [a for a in world.actions() if a.verb == "finish" and is_free(world, a)]


def at_rest(world: World) -> World:
    """Finish all firings whose finishing is free."""
    while done := finishing(world):
        world.apply(done[0])
    return world


def until_devices_are_free(world: World) -> tuple[World, list[Action]]:
    """The state after the current holders have given their devices back, and the actions that led there."""
    later, taken = fork(world), list[Action]()
    holds = {c.stage for c in held_by(later)}
    while holds and holds & {c.stage for c in held_by(later)}:
        action = next(a for a in later.actions() if a.who in holds and a.verb in ("finish", "decode", "load"))
        later.apply(action)
        taken.append(action)
    return later, taken


def held_by(world: World) -> list[Claim]:
    return [lease.holder for lease in world.leases.values() if lease.holder is not None]


def breaches(world: World) -> Iterator[str]:
    """The pairs (free action, other action) that violate condition 1 or 2 of `reduction`, as messages."""
    actions = world.actions()
    for free in (a for a in actions if explores(world) and is_free(world, a)):
        computes = free.verb in ("take", "grant")
        if computes and finishing(world):
            continue  # finishing comes first
        rest = at_rest if computes else lambda w: w
        first = rest(after(world, free))
        for other in [b for b in actions + world.faults() if b != free]:
            there, meanwhile = rest(after(world, other)), list[Action]()
            if free.verb == other.verb == "grant":
                there, meanwhile = until_devices_are_free(there)
            if free not in there.actions():
                yield f"{free} can't happen after {other}"
            elif not is_free(there, free):
                yield f"{free} is not free after {other}"
            elif other not in first.actions() + first.faults():
                yield f"{other} can't happen after {free}"
            elif outcome(rest(after(there, free))) != outcome(rest(after(first, other, *meanwhile))):
                yield f"{free} and {other} lead elsewhere in the other order"


def outcome(world: World) -> tuple[int, set[tuple[int, str]]]:
    return fingerprint(world).name, world.watch.fates


def every_state(config: Config, most: int) -> Iterator[World]:
    """The states that any order reaches, at most `most` per start (a choice of a failing row and a dying process)."""
    for first in starts(config, in_any_turn(config, THE_REAL_RULES)):
        ahead, seen = [first], set[int]()
        while ahead and len(seen) < most:
            world = ahead.pop()
            name = fingerprint(world).name
            if name not in seen:
                seen.add(name)
                ahead += [after(world, action) for action in world.actions() + world.faults()]
                yield world


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (Config("grpo", steps=1), 1000),
        (Config("grpo", "colocated", steps=1), 1000),
        (Config("ppo", "colocated", staleness=1, samples=2), 50),
        (Config("grpo", "colocated", steps=1, faults=RESTART), 60),
        (Config("grpo", "split", steps=1, faults=FAILURE), 30),
        (Config("grpo", "split", steps=1, faults=DROP), 60),
    ],
    ids=str,
)
def test_a_free_action_stays_free_and_commutes_with_every_other_action(config: Config, most: int):
    assert [breach for world in every_state(config, most) for breach in breaches(world)] == []


def along_a_run(config: Config, seed: int) -> Iterator[str]:
    """The violations in the states of one random run."""
    chance = random.Random(seed)
    world = chance.choice(list(starts(config, in_any_turn(config, THE_REAL_RULES))))
    while actions := world.actions():
        yield from breaches(world)
        faults = world.faults()
        world.apply(chance.choice(faults) if faults and chance.random() < 0.05 else chance.choice(actions))


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        (Config("ppo", "colocated", steps=2, staleness=1), 1),
        (Config("safe_rlhf", "mixed", steps=2, staleness=1), 1),
        (Config("grpo", "shared", steps=2, staleness=1), 1),
        (Config("remax", "split", steps=2, staleness=1, prompts=2), 2),
        (Config("ppo", "split", steps=2, faults=Faults(failures=1, drops=1)), 3),
        (Config("ppo", "split", steps=1, faults=RESTART), 4),
    ],
    ids=str,
)
def test_the_conditions_hold_along_random_runs_of_larger_spaces(config: Config, seed: int):
    assert list(along_a_run(config, seed)) == []


@pytest.mark.parametrize(
    "config",
    [
        Config("ppo", "split", steps=1),
        Config("ppo", "colocated", steps=1),
        Config("grpo", "colocated", staleness=1),
        Config("ppo", "shared", steps=1),
        Config("remax", "split", steps=1),
        Config("grpo", "colocated", steps=1, faults=FAILURE),
        Config("grpo", "colocated", steps=1, faults=RESTART),
    ],
    ids=str,
)
def test_a_run_ends_alike_with_and_without_the_reduction(config: Config):
    whole, reduced = explore(config, reduced=False), explore(config)
    assert whole.complete and reduced.complete
    assert reduced.fates == whole.fates
    assert reduced.ages == whole.ages
    assert (reduced.ends > 0) == (whole.ends > 0)


BROKEN = {
    "1 credit": (Config("remax", staleness=1), Rules(join_room=broken.credit(1))),
    "2 window": (Config("grpo", prompts=2, window=1), Rules(admission=broken.KeepsSlotsUntilTrained)),
    "3 lease": (Config("remax", "colocated", prompts=3), Rules(kept_while_sending="lease")),
    "3 room": (Config("grpo", staleness=1), Rules(has_room=broken.exactly_room)),
    "4 minimum": (Config("grpo"), Rules(fires_on=2)),
    "5 tombstones": (Config("grpo", steps=1, faults=Faults(failures=1)), Rules(tombstones=False)),
    "5 baseline": (Config("remax", steps=1, faults=Faults(failures=1)), Rules(prompt_join=broken.BlindToBaselines)),
    "6 samples": (Config("grpo", samples=2, faults=Faults(failures=1)), Rules(admission=broken.CountsSamples)),
    "7 budget": (Config("grpo", faults=Faults(failures=1)), Rules(admission=broken.KeepsTheBudgetOfTheDead)),
    "7 drop": (Config("grpo", faults=Faults(drops=1)), Rules(join_hears_first=False)),
    "8 age": (
        Config("grpo", staleness=1, steps=3, turns=2, stragglers=(1,)),
        Rules(inflight_prompts=broken.AgesAgainstYesterday),
    ),
    "9 newest": (
        Config("grpo", staleness=1, steps=3, turns=2, stragglers=(1,)),
        Rules(inflight_prompts=broken.NewestFirst),
    ),
    "10 due": (
        Config("grpo", staleness=2, steps=4, turns=2, stragglers=(1, 2)),
        Rules(inflight_prompts=broken.LooksAtWhatIsDueNow),
    ),
    "11 rises": (Config(), Rules(rises_after="policy")),
    "12 lease": (Config("grpo", "shared"), Rules(update_keeps_lease=True)),
    "13 min_version": (Config("grpo", replicas=2), Rules(min_version="nowhere")),
    "13 slot": (Config("grpo", replicas=2), Rules(min_version="in the slot", loads="when idle")),
    "13 loads": (Config("grpo", steps=3, replicas=2), Rules(loads="in any order")),
    "15 grain": (Config("remax"), Rules(prompt_join=broken.WithoutGrain)),
    "left": (Config("grpo", faults=Faults(duplicates=1)), Rules(row_table=broken.ForgetsWhatLeft)),
    "ended": (Config("grpo", faults=Faults(duplicates=1)), Rules(row_table=broken.ForgetsWhatEnded)),
    "outbox": (Config("grpo", steps=1, faults=Faults(restarts=1)), Rules(outbox=broken.LetsGoOfWhatWasTaken)),
    "attempts": (Config("grpo", steps=1, faults=Faults(restarts=1)), Rules(new_attempts=False)),
    "told": (Config("grpo", faults=Faults(restarts=1)), Rules(tells_ended=False)),
    "join": (
        Config("grpo", "colocated", prompts=2, steps=1, faults=Faults(restarts=1)),
        Rules(inflight_prompts=broken.NeverMarksIncomplete),
    ),
    "once": (Config("grpo", steps=1, faults=Faults(duplicates=1)), Rules(trains_once=False)),
}


@pytest.mark.parametrize("broken_rule", BROKEN)
def test_each_rule_that_is_broken_is_found(broken_rule: str):
    """An error that any order shows is found in the orders that the reduction explores."""
    config, rules = BROKEN[broken_rule]
    with pytest.raises((Deadlock, Violation, KeyError, ValueError, StalenessExceeded)):
        explore(config, rules)
