"""`asyncflow bench planning`: what the exact search and the simulator cost as devices and models grow.

PPO's four models, with a cost model five, with a critic of costs six, all of Llama 13B, on A100s; 1024 prompts of 1024
tokens, answered with as many. The simulator gets what the search has found. Seconds are those of one core: nothing
here waits, and whoever else computes does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import msgspec

from asyncflow.bench.report import Row
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import trace
from asyncflow.planner.costs.devices import CATALOGUE, Cluster
from asyncflow.planner.costs.set_costs import SetCosts
from asyncflow.planner.costs.shapes import LLAMA
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload, ppo
from asyncflow.planner.search.heterogeneous import shared_out
from asyncflow.planner.search.mapper import placements
from asyncflow.planner.simulation.scenarios import of_placement
from asyncflow.planner.simulation.simulator import simulate

DEVICE = "A100-80G"
BOUNDS = {(128, 4): 1.0, (1024, 6): 10.0}  # seconds that a search may take


class Sizes(msgspec.Struct, frozen=True):
    """How much is measured."""

    models: tuple[int, ...] = (4, 5, 6)
    devices: tuple[int, ...] = (128, 256, 512, 1024)
    simulated: tuple[int, ...] = (512, 2048, 8192)
    staleness: int = 1  # of what is simulated


QUICK = Sizes(models=(4,), devices=(16, 32), simulated=(32,))


class Searched(msgspec.Struct, frozen=True):
    """One search."""

    models: int
    devices: int
    table_s: float  # every set's best layouts at every size
    search_s: float
    enumerated: int  # splits that the paper's search looks at

    @property
    def total_s(self) -> float:
        return self.table_s + self.search_s


class Simulated(msgspec.Struct, frozen=True):
    """One simulation."""

    devices: int
    steps: int
    events: int
    total_s: float


class Figures(msgspec.Struct, frozen=True):
    """All of one run."""

    searched: list[Searched]
    simulated: list[Simulated]


def measure(sizes: Sizes = Sizes()) -> Figures:  # noqa: B008 - frozen
    """Search every pair of sizes, simulate every number of devices."""
    return Figures(
        [searched(models, devices) for models in sizes.models for devices in sizes.devices],
        [simulated(devices, sizes.staleness) for devices in sizes.simulated],
    )


def searched(models: int, devices: int) -> Searched:
    """Build the table of costs and search it, once."""
    start = time.process_time()
    found = SetCosts(_models(models), Cluster(CATALOGUE[DEVICE], devices), _workload())
    middle = time.process_time()
    found.best(devices, keep=2)
    return Searched(models, devices, middle - start, time.process_time() - middle, enumerated(models, devices))


def enumerated(models: int, devices: int) -> int:
    """Splits of all devices over the sets of every placement."""
    return sum(math.comb(devices - 1, len(sets) - 1) for sets in placements((1 << models) - 1))


def simulated(devices: int, staleness: int) -> Simulated:
    """Simulate the best placement of PPO's models."""
    cluster, workload, models = Cluster(CATALOGUE[DEVICE], devices), _workload(staleness), _models(4)
    best = shared_out(models, [cluster], workload, 1, lambda model, topology: True)[0][0]
    assert best is not None, "one kind has all models"
    scenario = of_placement(best, models, cluster, workload, trace(algorithm_named("ppo")))
    start = time.process_time()
    found = simulate(scenario)
    return Simulated(devices, scenario.pace.steps, found.events, time.process_time() - start)


def lines(figures: Figures) -> list[str]:
    """The figures for people, with their growth."""
    return [*_searches(figures.searched), *_simulations(figures.simulated)]


def rows(figures: Figures) -> list[Row]:
    """The figures as rows: a search beside the bound it was given."""
    found = [
        Row(f"search of {one.models} models on {one.devices}", one.total_s, "s",
            bound=BOUNDS.get((one.devices, one.models)))
        for one in figures.searched
    ]  # fmt: skip
    found += [Row(f"simulated step on {one.devices}", one.total_s / one.steps, "s") for one in figures.simulated]
    return found


def _searches(searched: Sequence[Searched]) -> Iterator[str]:
    before: Searched | None = None
    for one in searched:
        bound = BOUNDS.get((one.devices, one.models))
        yield (
            f"{one.models} models on {one.devices:5} devices: {one.total_s:6.2f} s (table {one.table_s:.2f}, search "
            f"{one.search_s:.2f}) for {one.enumerated:.1e} splits"
            + (f", within {bound:.0f} s" if bound and one.total_s <= bound else "")
            + (f", over {bound:.0f} s" if bound and one.total_s > bound else "")
            + (f", grows as N^{_exponent(before, one):.1f}" if before and before.models == one.models else "")
        )
        before = one


def _exponent(one: Searched, other: Searched) -> float:
    return math.log(other.total_s / one.total_s) / math.log(other.devices / one.devices)


def _simulations(simulated: Sequence[Simulated]) -> Iterator[str]:
    for one in simulated:
        yield (
            f"simulated on {one.devices:5} devices: {one.total_s / one.steps:6.2f} s a simulated step, "
            f"{one.events} events, {1e6 * one.total_s / one.events:.1f} us each"
        )


def _models(count: int) -> list[ModelWork]:
    scorer = LLAMA["13B"].scoring()
    more = [ModelWork("cost", scorer, forwards=1), ModelWork("cost_critic", scorer, forwards=1, trains=True)]
    return [*ppo(LLAMA["13B"]), *more][:count]


def _workload(staleness: int = 0) -> Workload:
    return Workload(1024, Lengths.fixed(1024), Lengths.fixed(1024), mini_batches=8, staleness=staleness)
