"""`placement = "auto"`: the placements that this build can run on some devices, simulated, and the best of them taken.

On accelerators the mapper says which are worth simulating. On CPU slots, which share their cores, every grouping of
the models is tried: a bound passes over those that can't win. What was chosen can be saved, edited and pinned.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import tomli_w

from asyncflow.compose import GENERATOR, REPLICATED, check_placement
from asyncflow.config import BadInput, Placed, Pool, Recipe
from asyncflow.dataflow.graph import Dataflow
from asyncflow.placement.devices import CATALOGUE, CPU_SLOT, SLOTS_PER_CORE, Cluster, Refused
from asyncflow.placement.mapper import placements
from asyncflow.placement.plan import Placement, ranked
from asyncflow.placement.workload import Lengths, ModelWork, work_of
from asyncflow.planning.calibration import Calibration, read_calibration
from asyncflow.planning.scenario import Scenario
from asyncflow.planning.scenarios import of_recipe, shapes_of, workload_of
from asyncflow.planning.simulator import Simulated, simulate
from protocols.topology import Topology

AUTO = "auto"
SIMULATED = 8  # of the mapper's placements of each way to generate
SHORT_STEPS = 4  # that look alike, of each candidate's simulation
SAME = 1.02  # steps that are this near count as equal: then fewer pools win


class Found(msgspec.Struct, frozen=True):
    """A placement that can be run, and how it did."""

    recipe: Recipe  # with its pools and its placement
    simulated: Simulated

    @property
    def name(self) -> str:
        """Pools with their services: "policy+critic on 1, generator on 1"."""
        services: dict[str, list[str]] = {pool: [] for pool in self.recipe.pools}
        for service, placed in self.recipe.placement.items():
            services[placed.pool].append(service)
        return ", ".join(f"{'+'.join(own)} on {self.recipe.pools[pool].devices}" for pool, own in services.items())


class Choice(msgspec.Struct, frozen=True):
    """The best placement, the next one, and how many were looked at."""

    chosen: Found
    runner_up: Found | None
    candidates: int
    cluster: Cluster


class SavedPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan's file: what a recipe takes as its pools and its placement."""

    pools: dict[str, Pool]
    placement: dict[str, Placed]
    predicted_step_seconds: float = 0.0
    chosen_on: str = ""


def place(recipe: Recipe, dataflow: Dataflow, prompt: Lengths, calibration: Calibration | None = None) -> Choice:
    """Choose pools and placement for a recipe. Raises BadInput, with the numbers, where nothing fits.

    `calibration` describes the devices; without it the recipe's pools do, or what is here.
    """
    calibration, count, device = devices_of(recipe, calibration)
    cluster = Cluster(calibration.device, count)
    try:
        models = work_of(dataflow, {r: s for r, s in shapes_of(recipe).items() if r in dataflow.services})
        candidates = list(_candidates(recipe, dataflow, models, cluster, calibration, prompt, device))
    except ValueError as error:
        raise BadInput(f"placement = 'auto': {error}") from None
    if not candidates:
        raise BadInput(f"placement = 'auto': this version runs no placement of {_told(models)} on {cluster}")
    found = _simulated(candidates, dataflow, prompt, calibration)
    fastest = min(one.simulated.step_s for one in found)
    found.sort(key=lambda one: (one.simulated.step_s > SAME * fastest, len(one.recipe.pools), one.simulated.step_s))
    others = sorted(found[1:], key=lambda one: one.simulated.step_s)
    return Choice(found[0], others[0] if others else None, len(candidates), cluster)


def devices_of(recipe: Recipe, calibration: Calibration | None) -> tuple[Calibration, int, str]:
    """The device, how many there are, and its name in a recipe: of the recipe's pools, or what is here."""
    kinds = {pool.device for pool in recipe.pools.values()}
    if len(kinds) > 1:
        raise BadInput(f"placement = 'auto': devices of one kind are mapped, the pools have {', '.join(sorted(kinds))}")
    cores = os.cpu_count() or 1
    named = next(iter(kinds), "")
    count = sum(pool.devices for pool in recipe.pools.values()) or cores * SLOTS_PER_CORE
    try:
        calibration = calibration or read_calibration(named or CPU_SLOT)
    except Refused as refused:
        raise BadInput(f"pools: {refused}") from None
    if calibration.device.name == CPU_SLOT and not calibration.device.cores:
        shared = msgspec.structs.replace(calibration.device, cores=float(cores))
        calibration = msgspec.structs.replace(calibration, device=shared)
    return calibration, count, named and calibration.device.name


def check_devices(recipe: Recipe) -> Recipe:
    """The recipe with its calibrations' files by full path. Raises BadInput for a device that nobody knows."""
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


def save(choice: Choice, path: Path) -> None:
    """Write a choice as a file that `placement` of a recipe may name."""
    path.write_text(text_of(choice))


def text_of(choice: Choice) -> str:
    """A choice as TOML, to be read, edited and pinned."""
    recipe = choice.chosen.recipe
    saved = SavedPlan(
        pools=recipe.pools,
        placement=recipe.placement,
        predicted_step_seconds=round(choice.chosen.simulated.step_s, 6),
        chosen_on=str(choice.cluster),
    )
    return tomli_w.dumps(msgspec.to_builtins(saved))


def pinned(recipe: Recipe, path: str) -> Recipe:
    """A recipe with the pools and the placement of a plan's file. Raises BadInput."""
    try:
        saved = msgspec.convert(tomllib.loads(Path(path).read_text("utf-8")), SavedPlan)
    except OSError as error:
        raise BadInput(f"placement = {path!r}: neither 'auto' nor a plan's file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"placement = {path!r}: {error}") from error
    return msgspec.structs.replace(recipe, pools=saved.pools, placement=saved.placement, placed_by="")


# --- candidates


def _candidates(
    recipe: Recipe,
    dataflow: Dataflow,
    models: list[ModelWork],
    cluster: Cluster,
    calibration: Calibration,
    prompt: Lengths,
    device: str,
) -> Iterator[Recipe]:
    """The recipe in every placement worth simulating that passes the checks of a run."""
    if cluster.device.name == CPU_SLOT:
        placed = _groupings(recipe, models, cluster.count, device)
    else:
        workload = workload_of(recipe, prompt, calibration.responses)
        mapped = ranked(models, cluster, workload, SIMULATED, lambda model, topology: _runs(recipe, model, topology))
        placed = (_of_mapper(recipe, placement, device) for placement in mapped)
    for candidate in placed:
        try:
            check_placement(candidate, dataflow)
        except BadInput:
            continue  # e.g. vLLM without a generator of its own
        yield candidate


def _groupings(recipe: Recipe, models: list[ModelWork], slots: int, device: str) -> Iterator[Recipe]:
    """Whole models on one slot each, in every grouping, with and without a generator of its own."""
    roles = [model.role for model in models]
    for services in (roles, [*roles, GENERATOR]):
        for sets in placements((1 << len(services)) - 1):
            grouped = [[s for i, s in enumerate(services) if mask >> i & 1] for mask in sets]
            if len(grouped) <= slots and not any({"policy", GENERATOR} <= set(group) for group in grouped):
                yield _with_pools(recipe, {"_".join(group): dict.fromkeys(group, Placed("")) for group in grouped},
                                  dict.fromkeys(("_".join(group) for group in grouped), 1), device)  # fmt: skip


def _of_mapper(recipe: Recipe, placement: Placement, device: str) -> Recipe:
    groups, devices = {}, {}
    for pool in placement.pools:
        name = pool.name.replace("+", "_")
        devices[name] = pool.devices
        groups[name] = {
            m.role: Placed("", parallel=m.parallel, generation=m.generation if m.role == "policy" else "")
            for m in pool.models
        }
    return _with_pools(recipe, groups, devices, device)


def _with_pools(
    recipe: Recipe, groups: Mapping[str, Mapping[str, Placed]], devices: Mapping[str, int], device: str
) -> Recipe:
    pools = {name: Pool(devices[name], device) for name in groups}
    placement = {
        service: msgspec.structs.replace(placed, pool=pool)
        for pool, services in groups.items()
        for service, placed in services.items()
    }
    return msgspec.structs.replace(recipe, pools=pools, placement=placement, placed_by="")


def _runs(recipe: Recipe, model: ModelWork, topology: Topology) -> bool:
    """Whether this build runs a model at a topology: see compose.check_placement, which has the last word."""
    if model.receives_from or recipe.models[model.role].lora.rank:
        return topology.world_size == 1
    return recipe.runtime != "local" or topology.world_size == 1 or (
        topology.replica_size == 1 and model.role in REPLICATED
    )  # fmt: skip


# --- the best of them


def _simulated(candidates: list[Recipe], dataflow: Dataflow, prompt: Lengths, calibration: Calibration) -> list[Found]:
    """The candidates that could win, simulated; the most hopeful first, so that the bound passes over the others."""
    scenarios = [(of_recipe(candidate, dataflow, prompt, calibration), candidate) for candidate in candidates]
    hopeful = sorted(((bound_s(s), i) for i, (s, _) in enumerate(scenarios)), key=lambda pair: pair[0])
    found: list[Found] = []
    for bound, number in hopeful:
        if len(found) > 1 and bound > sorted(one.simulated.step_s for one in found)[1]:
            break  # neither the best nor the runner-up
        scenario, candidate = scenarios[number]
        steps = min(scenario.pace.steps, scenario.steady.start + SHORT_STEPS + scenario.pace.staleness)
        pace = msgspec.structs.replace(scenario.pace, steps=steps)
        found.append(Found(candidate, simulate(msgspec.structs.replace(scenario, pace=pace))))
    return found


def bound_s(scenario: Scenario) -> float:
    """Seconds a step that no schedule beats: the busiest pool's work, and all work on the cores; at staleness 0 also
    drawing and training one after the other.
    """
    work = {service: sum(seconds) for service in scenario.pools if (seconds := _work_s(scenario, service))}
    pools: dict[str, float] = {}
    for service, seconds in work.items():
        if pool := scenario.pools[service]:
            pools[pool] = pools.get(pool, 0.0) + seconds
    bounds = [*pools.values(), sum(work.values()) / scenario.cores if scenario.cores else 0.0]
    if not scenario.pace.staleness:
        drawing = next(host for stage, host in scenario.hosts.items() if scenario.dataflow.stage(stage).generates)
        bounds.append(_work_s(scenario, drawing)[0] + _work_s(scenario, "policy")[2])
    return max(bounds)


def _work_s(scenario: Scenario, service: str) -> tuple[float, float, float]:
    """Seconds a step of drawing, inference and training, in calls as large as they can be."""
    speed, rows = scenario.speeds[service], scenario.samples_per_step
    prompt, response = scenario.prompt.mean, scenario.response.mean
    drawing = inference = training = 0.0
    for stage in scenario.dataflow.stages:
        if scenario.hosts[stage.name] != service:
            continue
        delay = scenario.delays.get(service, {}).get(stage.method, 0.0)
        if stage.generates:
            running = min(rows / speed.engines, speed.slots)
            rounds = rows / speed.engines / running
            drawing += delay + rounds * response * speed.decode_s(running, prompt + response / 2)
        elif stage.is_sink:
            training += delay + speed.update_s([round(prompt + response)] * rows)
        else:
            inference += delay + speed.forward_s([round(prompt + response)] * rows)
    return drawing, inference, training


def _told(models: list[ModelWork]) -> str:
    return ", ".join(model.label for model in models)
