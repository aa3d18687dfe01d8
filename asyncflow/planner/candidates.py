"""Candidate placements of a recipe: on accelerators the best of the search, on CPU slots every grouping."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import msgspec

from asyncflow.dataflow.graph import Dataflow
from asyncflow.planner.calibration.calibration import Calibration, read_calibration
from asyncflow.planner.costs.devices import Cluster, Refused
from asyncflow.planner.costs.layouts import Layout
from asyncflow.planner.costs.workload import Lengths, ModelWork
from asyncflow.planner.search.heterogeneous import KindPlacements, heterogeneous_placements
from asyncflow.planner.search.mapper import placements
from asyncflow.planner.search.plan import PlacedModel
from asyncflow.planner.simulation.scenarios import workload_of
from asyncflow.recipe.config import BadInput, Placed, Pool, Recipe
from asyncflow.recipe.model_checks import check_placement
from asyncflow.recipe.service_specs import GENERATOR
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from asyncflow.services.runtime import CPU_SLOT, SLOTS_PER_CORE
from protocols.layout.topology import Backend, Topology

KEEP_PLACEMENTS = 8  # placements from the search that are simulated, for each way to generate


class DeviceKind(msgspec.Struct, frozen=True):
    """Devices of one kind, and their name in a recipe's pools; "" means the default device."""

    device: str
    count: int
    calibration: Calibration

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.calibration.device, self.count)


def device_kinds(recipe: Recipe, calibration: Calibration | None) -> list[DeviceKind]:
    """The devices of a recipe's pools, or this machine's CPU slots. Raises BadInput.

    A given `calibration` describes all of them; then they must be of one kind.
    """
    counts: dict[str, int] = {}
    for pool in recipe.pools.values():
        counts[pool.device] = counts.get(pool.device, 0) + pool.devices
    kinds = [_kind(device, count, calibration) for device, count in counts.items()]
    kinds = kinds or [_kind("", (os.cpu_count() or 1) * SLOTS_PER_CORE, calibration)]
    devices_text = ", ".join(str(kind.cluster) for kind in kinds)
    if len({kind.device for kind in kinds}) < len(kinds):
        raise BadInput(
            f"placement = 'auto': the pools have {devices_text}: give one calibration for each kind of device"
        )
    if len(kinds) > 1 and any(kind.cluster.device.name == CPU_SLOT for kind in kinds):
        raise BadInput(
            f"placement = 'auto': CPU slots share their cores and can't be mixed with other devices, "
            f"the pools have {devices_text}"
        )
    return kinds


def _kind(device: str, count: int, calibration: Calibration | None) -> DeviceKind:
    try:
        calibration = calibration or read_calibration(device or CPU_SLOT)
    except Refused as refused:
        raise BadInput(f"pools: {refused}") from None
    if calibration.device.name == CPU_SLOT and not calibration.device.cores:
        shared = msgspec.structs.replace(calibration.device, cores=float(os.cpu_count() or 1))
        calibration = msgspec.structs.replace(calibration, device=shared)
    return DeviceKind(device and calibration.device.name, count, calibration)


def candidates(
    recipe: Recipe, dataflow: Dataflow, models: list[ModelWork], kinds: Sequence[DeviceKind], prompt: Lengths
) -> Iterator[Recipe]:
    """The recipe in every candidate placement that passes the checks of a run."""
    if kinds[0].cluster.device.name == CPU_SLOT:
        placed = _groupings(recipe, models, kinds[0])
    else:
        workload = workload_of(recipe, prompt, kinds[0].calibration)
        mapped = heterogeneous_placements(models, [kind.cluster for kind in kinds], workload, KEEP_PLACEMENTS,
                              partial(runs, recipe))  # fmt: skip
        placed = (_from_search(recipe, shared, kinds) for shared in mapped)
    for candidate in placed:
        try:
            check_placement(candidate, dataflow)
        except BadInput:
            continue  # e.g. vLLM without a separate generator
        yield candidate


def _groupings(recipe: Recipe, models: list[ModelWork], kind: DeviceKind) -> Iterator[Recipe]:
    """Whole models on one slot each, in every grouping, with and without a separate generator."""
    roles = [model.role for model in models]
    for services in (roles, [*roles, GENERATOR]):
        for sets in placements((1 << len(services)) - 1):
            grouped = [[s for i, s in enumerate(services) if mask >> i & 1] for mask in sets]
            if len(grouped) <= kind.count and not any({"policy", GENERATOR} <= set(group) for group in grouped):
                groups = {"_".join(group): dict.fromkeys(group, Placed("")) for group in grouped}
                yield _with_pools(recipe, groups, dict.fromkeys(groups, Pool(1, kind.device)))


def _from_search(recipe: Recipe, shared: KindPlacements, kinds: Sequence[DeviceKind]) -> Recipe:
    groups, pools = {}, {}
    for kind, placement in zip(kinds, shared, strict=True):
        for pool in placement.pools if placement else ():
            name = pool.name.replace("+", "_")
            pools[name] = Pool(pool.devices, kind.device)
            groups[name] = {
                m.role: Placed(
                    "",
                    parallel=m.parallel,
                    generation=m.generation if m.role == "policy" else "",
                    backend=_backend(m),
                    recompute=m.recompute,
                )
                for m in pool.models
            }
    return _with_pools(recipe, groups, pools)


def _backend(model: PlacedModel) -> Backend:
    """The backend that the memory model assumes: replicas that train divide the optimizer state, and nothing else."""
    return "zero1" if Topology.parse(model.parallel).dp > 1 and ROLE_SPECS[model.role].trains else "3d"


def _with_pools(recipe: Recipe, groups: Mapping[str, Mapping[str, Placed]], pools: dict[str, Pool]) -> Recipe:
    placement = {
        service: msgspec.structs.replace(placed, pool=pool)
        for pool, services in groups.items()
        for service, placed in services.items()
    }
    return msgspec.structs.replace(recipe, pools=pools, placement=placement, placed_by="")


def runs(recipe: Recipe, model: ModelWork, layout: Layout) -> bool:
    """Whether this version runs a model of a recipe in a layout. `check_placement` has the last word."""
    topology = layout.topology
    if layout.gen_pp > 1 and recipe.generation.engine == "vllm":
        return False
    if model.receives_from:
        return topology.world_size == 1
    if recipe.models[model.role].lora.rank and (topology.replica_size > 1 or (topology.dp > 1 and model.hybrid)):
        return False
    return recipe.runtime != "local" or topology.world_size == 1 or (
        topology.replica_size == 1 and ROLE_SPECS[model.role].replicable
    )  # fmt: skip
