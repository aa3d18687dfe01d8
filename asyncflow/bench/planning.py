"""`asyncflow bench planning`: how long the exact search and the simulator take as devices and models grow.

The models are PPO's four, plus a cost model, plus a cost critic, all Llama 13B on A100s, with 1024 prompts of 1024
tokens and responses of the same length. The simulator runs the placement that the search has found. Seconds are CPU
seconds of this process, which the load of the machine does not change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import msgspec

from asyncflow.bench.report import BenchRow, Measured
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import trace
from asyncflow.planner.costs.devices import CATALOGUE, Cluster
from asyncflow.planner.costs.set_costs import SetCosts
from asyncflow.planner.costs.shapes import LLAMA
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload, ppo
from asyncflow.planner.search.heterogeneous import heterogeneous_placements
from asyncflow.planner.search.mapper import placements
from asyncflow.planner.simulation.scenarios import of_placement
from asyncflow.planner.simulation.simulator import simulate

DEVICE = "A100-80G"
BOUNDS = {(128, 4): 1.0, (1024, 6): 10.0}  # seconds that a search may take


class PlanningBenchSizes(msgspec.Struct, frozen=True):
    """How much is measured."""

    models: tuple[int, ...] = (4, 5, 6)
    devices: tuple[int, ...] = (128, 256, 512, 1024)
    simulated: tuple[int, ...] = (512, 2048, 8192)
    staleness: int = 1  # of the simulated runs


QUICK = PlanningBenchSizes(models=(4,), devices=(16, 32), simulated=(32,))


class SearchTiming(msgspec.Struct, frozen=True):
    """The time of one search."""

    models: int
    devices: int
    table_s: float  # every set's best layouts at every size
    search_s: float
    enumerated: int  # splits that the paper's search enumerates

    @property
    def total_s(self) -> float:
        return self.table_s + self.search_s


class SimulationTiming(msgspec.Struct, frozen=True):
    """The time of one simulation."""

    devices: int
    steps: int
    total_s: float


def run(*, quick: bool) -> Measured:
    """The benchmark, as the command line runs it."""
    searches, simulations = measure(QUICK if quick else PlanningBenchSizes())
    return Measured.joined([measured_searches(searches), measured_simulations(simulations)])


def measure(sizes: PlanningBenchSizes) -> tuple[list[SearchTiming], list[SimulationTiming]]:
    """Search every pair of sizes and simulate every number of devices."""
    return (
        [searched(models, devices) for models in sizes.models for devices in sizes.devices],
        [simulated(devices, sizes.staleness) for devices in sizes.simulated],
    )


def searched(models: int, devices: int) -> SearchTiming:
    """Build the table of costs and search it, once."""
    start = time.process_time()
    found = SetCosts(_models(models), Cluster(CATALOGUE[DEVICE], devices), _workload())
    middle = time.process_time()
    found.best(devices, keep=2)
    return SearchTiming(models, devices, middle - start, time.process_time() - middle, enumerated(models, devices))


def enumerated(models: int, devices: int) -> int:
    """The number of splits of all devices over the sets of every placement."""
    return sum(math.comb(devices - 1, len(sets) - 1) for sets in placements((1 << models) - 1))


def simulated(devices: int, staleness: int) -> SimulationTiming:
    """Simulate the best placement of PPO's models."""
    cluster, workload, models = Cluster(CATALOGUE[DEVICE], devices), _workload(staleness), _models(4)
    best = heterogeneous_placements(models, [cluster], workload, 1, lambda model, layout: True)[0][0]
    assert best is not None, "the only kind of device has all models"
    scenario = of_placement(best, models, cluster, workload, trace(algorithm_named("ppo")))
    start = time.process_time()
    simulate(scenario)
    return SimulationTiming(devices, scenario.pace.steps, time.process_time() - start)


def measured_searches(timings: Sequence[SearchTiming]) -> Measured:
    """The searches as rows, with their time bounds, and as text, with their growth."""
    rows, lines = list[BenchRow](), list[str]()
    before: SearchTiming | None = None
    for one in timings:
        bound = BOUNDS.get((one.devices, one.models))
        rows.append(BenchRow(f"search of {one.models} models on {one.devices}", one.total_s, "s", bound=bound))
        line = (
            f"{one.models} models on {one.devices:5} devices: {one.total_s:6.2f} s (table {one.table_s:.2f}, search "
            f"{one.search_s:.2f}) for {one.enumerated:.1e} splits"
        )
        if bound:
            line += f", {'within' if one.total_s <= bound else 'over'} {bound:.0f} s"
        if before and before.models == one.models:
            exponent = math.log(one.total_s / before.total_s) / math.log(one.devices / before.devices)
            line += f", grows as N^{exponent:.1f}"
        lines.append(line)
        before = one
    return Measured(rows, lines)


def measured_simulations(timings: Sequence[SimulationTiming]) -> Measured:
    """The simulations as rows and as text."""
    return Measured(
        [BenchRow(f"simulated step on {one.devices}", one.total_s / one.steps, "s") for one in timings],
        [f"simulated on {one.devices:5} devices: {one.total_s / one.steps:6.2f} s a simulated step" for one in timings],
    )


def _models(count: int) -> list[ModelWork]:
    scorer = LLAMA["13B"].scoring()
    more = [ModelWork("cost", scorer, forwards=1), ModelWork("cost_critic", scorer, forwards=1, trains=True)]
    return [*ppo(LLAMA["13B"]), *more][:count]


def _workload(staleness: int = 0) -> Workload:
    return Workload(1024, Lengths.fixed(1024), Lengths.fixed(1024), mini_batches=8, staleness=staleness)
