"""The estimated memory of each service of a recipe in its placement, on one of its ranks; for `asyncflow validate`.

The search for placements assumes bfloat16 and the 3D backend (`planner.costs.memory`); this is for the recipe's own
dtypes and backends. Sizes are those of the decoder that config.json describes. What a framework needs comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec

from asyncflow.planner.calibration.calibration import read_calibration
from asyncflow.planner.costs.costs import GRADIENT_BYTES, micro_rows
from asyncflow.planner.costs.memory import Footprint, activations
from asyncflow.planner.costs.shapes import WEIGHT_BYTES, Shape
from asyncflow.planner.costs.workload import ModelWork, Workload, with_separate_generator, work_of
from asyncflow.planner.simulation.scenarios import prompt_lengths, workload_of
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.config import Recipe
from asyncflow.recipe.service_specs import (
    GENERATOR,
    NO_DEVICE,
    backend_of,
    colocates_vllm,
    layout_of,
    pools_of,
    topology_of,
)
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from asyncflow.services.runtime import CPU_SLOT
from protocols.layout.topology import Backend
from workers.data.folder_tensors import stored_tensors

MOMENT_BYTES = 8  # Adam's two moments, in float32
MASTER_BYTES = 4  # the float32 copy of weights that are bfloat16


class RankMemory(msgspec.Struct, frozen=True):
    """Where a service runs, and what one of its ranks needs; None: no estimate."""

    service: str
    pool: str  # "": it needs no device
    ranks: int
    parallel: str
    model: str  # name of its folder, or its rule
    footprint: Footprint | None
    cache_bytes: float = 0.0  # of keys and values, where it generates
    why: str = ""  # there is no footprint, or one without activations


def rank_memory(checked: Checked) -> list[RankMemory]:
    """The services of a checked recipe in their order, with their memory."""
    recipe, dataflow = checked.recipe, checked.dataflow
    workload = workload_of(recipe, prompt_lengths(checked.train), read_calibration(CPU_SLOT))
    shapes, unknown = _shapes_of(recipe)
    works: dict[str, ModelWork] = {}
    if "policy" in shapes:
        found = work_of(dataflow, shapes)
        found = with_separate_generator(found) if GENERATOR in recipe.placement else found
        works = {work.role: work for work in found}
    services = []
    for service, pool in pools_of(recipe, dataflow).items():
        role = "policy" if service == GENERATOR else service
        model, topology = recipe.models.get(role), topology_of(recipe, service)
        name = "" if model is None else Path(model.path).name if model.path else ", ".join(model.rules)
        name = "external" if model is not None and model.outside else name
        one = RankMemory(service, pool, topology.world_size, str(topology), name, None)
        weight_bytes = 4 if model is None or model.dtype == "float32" else WEIGHT_BYTES
        if pool != NO_DEVICE and service in works:
            one = msgspec.structs.replace(
                one,
                footprint=_footprint(recipe, works[service], workload, weight_bytes),
                cache_bytes=_cache_bytes(recipe, works[service], workload, weight_bytes),
            )
        elif pool != NO_DEVICE and model is not None and model.path:
            kept = _of_unknown_shape(recipe, service, model.path, weight_bytes)
            why = f"activations not estimated ({unknown.get(role) or unknown['policy']})"
            one = msgspec.structs.replace(one, footprint=kept, why=why)
        elif pool != NO_DEVICE:
            one = msgspec.structs.replace(one, why="no estimate for it")
        services.append(one)
    return services


def pool_bytes(services: list[RankMemory], pool: str) -> float:
    """Bytes on the fullest device of a pool: all that its services keep, and the most that one of them adds."""
    own = [one for one in services if one.pool == pool and one.footprint is not None]
    kept = sum(one.footprint.resident + one.cache_bytes for one in own if one.footprint is not None)
    return kept + max((one.footprint.transient for one in own if one.footprint is not None), default=0.0)


# backend -> whether the replicas divide weights, gradients and moments
_DIVIDED: Mapping[Backend, tuple[bool, bool, bool]] = {
    "3d": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "fsdp": (True, True, True),
}


def _footprint(recipe: Recipe, work: ModelWork, workload: Workload, weight_bytes: int) -> Footprint:
    topology = topology_of(recipe, work.role)
    own = work.shape.stage_parameters(topology.pp) / topology.tp
    rank = _lora_rank(recipe, work.role)
    trained = 0.0 if not work.trains else own if not rank else _adapter_parameters(work.shape, rank)
    kept = _kept(recipe, work.role, own, trained, weight_bytes)
    if not (work.trains or work.forwards):
        return kept
    rows = math.ceil(workload.samples / (workload.mini_batches if work.trains else 1) / topology.dp)
    tokens = max(micro_rows(rows, topology.pp, workload) * workload.sample_tokens, workload.longest_sample)
    recompute = work.role in recipe.placement and recipe.placement[work.role].recompute
    return msgspec.structs.replace(kept, activations=activations(work, topology, tokens, recompute, weight_bytes))


def _kept(recipe: Recipe, service: str, own: float, trained: float, weight_bytes: int) -> Footprint:
    """What a rank keeps of a model of which it holds `own` parameters and trains `trained`; without activations."""
    topology, backend = topology_of(recipe, service), backend_of(recipe, service)
    weights, gradients, moments = (1 / topology.dp if divided else 1.0 for divided in _DIVIDED[backend])
    master = MASTER_BYTES if weight_bytes < MASTER_BYTES and not _lora_rank(recipe, service) else 0
    share_is_master = bool(master and trained) and weights < 1.0  # of fsdp: a layer is rounded when it is gathered
    return Footprint(
        weights=0.0 if share_is_master else own * weight_bytes * weights,
        optimizer=trained * (MOMENT_BYTES + master) * moments,
        gradients=trained * GRADIENT_BYTES * gradients,
        activations=0.0,
    )


def _of_unknown_shape(recipe: Recipe, service: str, folder: str, weight_bytes: int) -> Footprint:
    """Weights, optimizer and gradients by the tensors of a folder whose config describes no dense decoder."""
    tensors = stored_tensors(folder).values()
    own, rank = float(sum(math.prod(tensor.shape) for tensor in tensors)), _lora_rank(recipe, service)
    trains = service in ROLE_SPECS and ROLE_SPECS[service].trains
    matrices = (tensor.shape for tensor in tensors if len(tensor.shape) == 2)
    adapters = rank * sum(rows + columns for rows, columns in matrices)
    return _kept(recipe, service, own, 0.0 if not trains else adapters if rank else own, weight_bytes)


def _lora_rank(recipe: Recipe, service: str) -> int:
    return recipe.models[service].lora.rank if service in recipe.models else 0


def _adapter_parameters(shape: Shape, rank: int) -> float:
    """Entries of A and B of every linear layer."""
    heads = shape.head_dimension * (shape.heads + shape.kv_heads) * 2
    return shape.layers * rank * (4 * shape.hidden + heads + 3 * (shape.hidden + shape.intermediate))


def _cache_bytes(recipe: Recipe, work: ModelWork, workload: Workload, weight_bytes: int) -> float:
    """Keys and values on one rank that generates: vLLM's given size, or what the rows of all its slots need."""
    if not work.generates:
        return 0.0
    given = recipe.generation.kv_cache_bytes if recipe.generation.engine == "vllm" else 0
    layout = layout_of(recipe, work.role)
    token = work.shape.kv_bytes(layout.pp, layout.tp) * weight_bytes / WEIGHT_BYTES
    copy = work.shape.parameters * weight_bytes / (layout.pp * layout.tp) if _holds_copy(recipe, work.role) else 0.0
    return copy + (given or min(recipe.generation.slots, workload.samples) * workload.longest_sample * token)


def _holds_copy(recipe: Recipe, role: str) -> bool:
    """Whether an engine beside the trained model has weights of its own."""
    return role != GENERATOR and (colocates_vllm(recipe) or topology_of(recipe, role).world_size > 1)


def _shapes_of(recipe: Recipe) -> tuple[dict[str, Shape], dict[str, str]]:
    """The shapes of the models by role, and why there is none."""
    shapes, unknown = dict[str, Shape](), dict[str, str]()
    for role, model in recipe.models.items():
        if model.path:
            try:
                config = msgspec.json.decode((Path(model.path) / "config.json").read_bytes())
                shape = Shape.from_config(Path(model.path).name, config)
                shapes[role] = shape if ROLE_SPECS[role].head == "tokens" else shape.scoring()
            except ValueError as error:
                unknown[role] = str(error)
    return shapes, unknown
