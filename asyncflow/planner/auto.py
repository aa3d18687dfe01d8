"""`placement = "auto"`: simulate the placements that this version can run, and choose the fastest.

A lower bound on the step time skips candidates that can't win.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncflow.dataflow.graph import Dataflow
from asyncflow.planner.calibration.calibration import Calibration, read_calibration
from asyncflow.planner.candidates import candidates, device_kinds
from asyncflow.planner.costs.devices import CATALOGUE, Refused
from asyncflow.planner.costs.workload import Lengths, work_of
from asyncflow.planner.simulation.scenario import Scenario
from asyncflow.planner.simulation.scenarios import of_recipe, shapes_of
from asyncflow.planner.simulation.simulator import SimulatedRun, simulate
from asyncflow.recipe.config import BadInput, Recipe

AUTO = "auto"
SHORT_STEPS = 4  # steady steps of each candidate's simulation
SAME = 1.02  # step times within this factor count as equal; then fewer pools win


class SimulatedPlacement(msgspec.Struct, frozen=True):
    """A candidate placement, and the result of its simulation."""

    recipe: Recipe  # with the pools and the placement of the candidate
    simulated: SimulatedRun

    @property
    def name(self) -> str:
        """Pools with their services: "policy+critic on 1, generator on 1"."""
        services: dict[str, list[str]] = {pool: [] for pool in self.recipe.pools}
        for service, placed in self.recipe.placement.items():
            services[placed.pool].append(service)
        return ", ".join(f"{'+'.join(own)} on {self.recipe.pools[pool].devices}" for pool, own in services.items())


class PlacementChoice(msgspec.Struct, frozen=True):
    """The best placement, the runner-up, and the number of candidates."""

    chosen: SimulatedPlacement
    runner_up: SimulatedPlacement | None
    candidates: int
    devices: str  # "8xA100-80G + 4xH100"


def place(
    recipe: Recipe, dataflow: Dataflow, prompt: Lengths, calibration: Calibration | None = None
) -> PlacementChoice:
    """Choose pools and placement for a recipe. Raises BadInput, with the numbers, if nothing fits.

    The devices are those of `calibration`, else of the recipe's pools, else this machine's CPU slots.
    """
    kinds = device_kinds(recipe, calibration)
    devices_text = " + ".join(str(kind.cluster) for kind in kinds)
    try:
        models = work_of(dataflow, shapes_of(recipe))
        feasible = list(candidates(recipe, dataflow, models, kinds, prompt))
    except ValueError as error:
        raise BadInput(f"placement = 'auto': {error}") from None
    if not feasible:
        names = ", ".join(model.label for model in models)
        raise BadInput(f"placement = 'auto': this version runs no placement of {names} on {devices_text}")
    devices = {kind.device: kind.calibration.device for kind in kinds}
    found = _simulated([(of_recipe(one, dataflow, prompt, kinds[0].calibration, devices), one) for one in feasible])
    fastest = min(one.simulated.step_s for one in found)
    found.sort(key=lambda one: (one.simulated.step_s > SAME * fastest, len(one.recipe.pools), one.simulated.step_s))
    others = sorted(found[1:], key=lambda one: one.simulated.step_s)
    return PlacementChoice(found[0], others[0] if others else None, len(feasible), devices_text)


def check_devices(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of calibration files. Raises BadInput for an unknown device."""
    pools = {}
    for name, pool in recipe.pools.items():
        known = not pool.device or pool.device in CATALOGUE
        device = pool.device if known else str(Path(pool.device).absolute())
        try:
            if not known:
                read_calibration(device)
        except Refused as refused:
            raise BadInput(f"pools.{name}: {refused}") from None
        pools[name] = msgspec.structs.replace(pool, device=device)
    return msgspec.structs.replace(recipe, pools=pools)


def _simulated(scenarios: list[tuple[Scenario, Recipe]]) -> list[SimulatedPlacement]:
    """Simulate candidates in order of their bounds; stop when the remaining bounds exceed the runner-up."""
    by_bound = sorted(((bound_s(s), i) for i, (s, _) in enumerate(scenarios)), key=lambda pair: pair[0])
    found: list[SimulatedPlacement] = []
    for bound, number in by_bound:
        if len(found) > 1 and bound > sorted(one.simulated.step_s for one in found)[1]:
            break  # it can be neither the best nor the runner-up
        scenario, candidate = scenarios[number]
        steps = min(scenario.pace.steps, scenario.steady.start + SHORT_STEPS + scenario.pace.staleness)
        pace = msgspec.structs.replace(scenario.pace, steps=steps)
        found.append(SimulatedPlacement(candidate, simulate(msgspec.structs.replace(scenario, pace=pace))))
    return found


def bound_s(scenario: Scenario) -> float:
    """A lower bound on the seconds of a step, under any schedule.

    The maximum of the busiest pool's work, of all work divided by the cores, and at staleness 0 of generation plus
    training.
    """
    work = {service: sum(seconds) for service in scenario.pools if (seconds := _work_s(scenario, service))}
    pools: dict[str, float] = {}
    for service, seconds in work.items():
        if pool := scenario.pools[service]:
            pools[pool] = pools.get(pool, 0.0) + seconds
    bounds = [*pools.values(), sum(work.values()) / scenario.cores if scenario.cores else 0.0]
    if not scenario.pace.staleness:
        generator = next(scenario.services[stage.name] for stage in scenario.dataflow.stages if stage.generates)
        bounds.append(_work_s(scenario, generator)[0] + _work_s(scenario, "policy")[2])
    return max(bounds)


def _work_s(scenario: Scenario, service: str) -> tuple[float, float, float]:
    """Seconds a step of generation, inference and training, in calls of the whole batch."""
    speed, rows = scenario.speeds[service], scenario.samples_per_step
    prompt, response = scenario.prompt.mean, scenario.response.mean
    generation = inference = training = 0.0
    for stage in scenario.dataflow.stages:
        if scenario.services[stage.name] != service:
            continue
        delay = scenario.delays.get(service, {}).get(stage.method, 0.0)
        if stage.generates:
            running = min(rows / speed.engines, speed.slots)
            rounds = rows / speed.engines / running
            generation += delay + rounds * response * speed.decode_s(running, prompt + response / 2)
        elif stage.is_sink:
            training += delay + speed.update_s([round(prompt + response)] * rows)
        else:
            inference += delay + speed.forward_s([round(prompt + response)] * rows)
    return generation, inference, training
