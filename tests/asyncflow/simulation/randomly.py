"""Random configurations, one run of each, and a table of the results."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

import msgspec

from tests.asyncflow.simulation.algorithms import ALGORITHMS
from tests.asyncflow.simulation.configuration import Config, Faults, Layout
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.schedulers import by_durations, in_any_order
from tests.asyncflow.simulation.watch import nearer
from tests.asyncflow.simulation.world import THE_REAL_RULES, World


class Result(msgspec.Struct):
    """The result of one run."""

    seed: int
    config: Config
    wrong: str  # the error, "" if there was none
    counts: Counter[str]
    nearest: dict[str, tuple[int, int]]  # bound -> (value, limit) when it was nearest to its limit


def configuration(seed: int) -> Config:
    """A random configuration: small or medium, with few or many faults."""
    chance = random.Random(seed)
    layout: Layout = chance.choice(get_args(Layout))
    prompts, staleness = chance.randint(1, 6), chance.randint(0, 3)
    natural = (staleness + 1) * prompts

    def some(most: int) -> int:
        return chance.choice([0, 0, chance.randint(0, most)])

    return Config(
        algorithm=chance.choice(sorted(ALGORITHMS)),
        layout=layout,
        prompts=prompts,
        samples=chance.randint(1, 4),
        staleness=staleness,
        window=chance.choice([0, prompts, chance.randint(1, natural)]),
        steps=chance.randint(2, 6),
        capacity=chance.randint(1, 8),
        firing_rows=chance.randint(1, 8),
        slots=chance.randint(1, 8),
        replicas=1 if layout == "colocated" else chance.randint(1, 3),
        turns=chance.choice([1, 4, 20]),
        faults=Faults(failures=some(12), drops=some(8), duplicates=some(20), losses=some(20), restarts=some(6)),
    )


def result_of(seed: int, rules: Rules = THE_REAL_RULES, config: Config | None = None) -> Result:
    """Run one configuration under a schedule that the seed determines."""
    config = configuration(seed) if config is None else config
    world = World(config, rules)
    fault_rate = 0.1 if config.faults != Faults() else 0.0
    wrong = ""
    try:
        if seed % 3:
            by_durations(world, seed, fault_rate, spread=seed % 2)
        else:
            in_any_order(world, seed, fault_rate)
    except Exception as error:  # noqa: BLE001 - any error is this run's result
        wrong = f"{type(error).__name__}: {error}"
    return Result(seed, config, wrong, world.watch.counts, world.watch.nearest)


FAULTS = ("fail", "drop", "duplicate", "lose", "restart", "unreadable")


def table(results: Sequence[Result]) -> str:
    """The number of runs, the injected faults, and how near each bound was reached."""
    counts = sum((r.counts for r in results), Counter[str]())
    wrong = [r for r in results if r.wrong]
    lines = [
        f"runs            {len(results)}, {len(wrong)} wrong",
        f"prompts         {counts['trained']} trained, {counts['failed']} failed, {counts['dropped']} dropped",
        f"actions         {counts['actions']}",
        "faults          " + ", ".join(f"{counts[f]} {f}" for f in FAULTS),
        *_shares("algorithm", (r.config.algorithm for r in results)),
        *_shares("layout", (r.config.layout for r in results)),
        "nearest to its limit:",
    ]
    nearest: dict[str, tuple[int, int]] = {}
    for result in results:
        for what, pair in result.nearest.items():
            nearest[what] = nearer(nearest.get(what, (0, 1)), pair)
    lines += [f"  {what:<24} {value} of {limit}" for what, (value, limit) in sorted(nearest.items())]
    lines += [f"WRONG seed {r.seed}: {r.wrong}\n  {r.config}" for r in wrong[:5]]
    return "\n".join(lines)


def _shares(what: str, values: Iterable[str]) -> list[str]:
    counts = Counter(values)
    return [f"{what:<15} " + ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))]
