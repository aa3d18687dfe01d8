"""Builds a service's worker inside its own process: by the registry of roles, or a class of the user's own."""

from __future__ import annotations

import functools
import importlib
import math
import os
import time
from typing import TYPE_CHECKING

from asyncflow.observe.log import close_log, open_log
from asyncflow.services.ranks.loaded_worker import LoadedWorker
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from asyncflow.services.ranks.shared_process import loading
from asyncflow.services.ranks.spec import ModelSettings, ServiceSpec, StageSpec, effective_protocol
from protocols.layout.topology import Topology
from protocols.stage import StageContract, contract_of
from workers.data.folder_tensors import stored_tensors
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.user_code import search_in

if TYPE_CHECKING:
    from workers.parallel.process_group import World


@functools.cache
def contract_for(role: str, method: str) -> StageContract:
    """What a stage of such a service takes and gives. Raises LookupError naming the stages that it has."""
    return contract_of(spec.contract if (spec := ROLE_SPECS.get(role)) and spec.contract else _own(role), method)


def direct_call(spec: ServiceSpec, method: str) -> StageSpec:
    """A stage without edges, for a call outside the dataflow."""
    contract = contract_for(spec.role, method)
    name = f"{spec.name}.{method} invoked"
    return StageSpec(
        name=name,
        method=method,
        fires="rows",
        inputs=[f"{name}.{position}" for position in range(len(contract.consumes))],
        schemas=[kind.schema_id for kind in contract.consumes],
        sources=[],
        outputs=[],
        protocol=effective_protocol(contract.protocol, spec.topology),
    )


def _own(role: str) -> type:
    """A worker class of the user's own, "package.module:Class". Raises LookupError where there is none."""
    module, _, name = role.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"no role {role!r}: {error}; want one of {', '.join(ROLE_SPECS)}, or module:Class") from None


def _sharding_of(spec: ServiceSpec, world: World | None) -> Sharding:
    """The ranks that share the service's model, or this one alone, on the device that its pool gives it."""
    if world is not None:
        topology = spec.topology if world.size > 1 else Topology()
        return Sharding(topology, spec.backend, world.device, spec.recompute)
    if not spec.accelerated:
        return ONE_DEVICE._replace(recompute=spec.recompute)
    from workers.parallel.process_group import own_device

    return Sharding(device=own_device(0), recompute=spec.recompute)


def build(spec: ServiceSpec, rank: int = 0, world: World | None = None) -> LoadedWorker:
    """Build the worker of one of a service's ranks; `world`: of several that work together. Blocking: loads models.

    The service's log tells what was loaded, and has what libraries wrote meanwhile.
    """
    log, start = open_log(spec.log_path), time.monotonic()
    who = f"{spec.name} rank {rank}" if spec.topology.world_size > 1 else spec.name
    log.info("%s starts in process %d", who, os.getpid())
    try:
        with loading(spec.log_path):
            loaded = _build(spec, rank, world)
    except Exception:
        log.exception("%s did not start", who)
        raise
    else:
        log.info("%s is ready after %.1f s: %s", who, time.monotonic() - start, _described(spec, world))
        return loaded
    finally:
        close_log(log)


def _described(spec: ServiceSpec, world: World | None) -> str:
    """The model that a worker has, in words."""
    if not isinstance(spec.settings, ModelSettings) or not spec.settings.model.folders:
        return "it has no model"
    models = [f"{folder}, {_parameters(folder) / 1e6:.1f} M parameters" for folder in spec.settings.model.folders]
    sharding = _sharding_of(spec, world)
    return f"{'; '.join(models)}, {spec.settings.model.dtype}, on {sharding.device}, in ranks {sharding.topology}"


def _parameters(folder: str) -> int:
    return sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())


def _build(spec: ServiceSpec, rank: int, world: World | None) -> LoadedWorker:
    search_in(spec.code)
    if spec.role not in ROLE_SPECS:
        return LoadedWorker(_own(spec.role)(spec, rank), world=world)
    if not isinstance(spec.settings, ModelSettings) or not spec.settings.model.folders:  # it does without torch
        return ROLE_SPECS[spec.role].build(spec, spec.settings, ONE_DEVICE)
    import torch

    torch.set_num_threads(spec.limits.threads)
    if spec.deterministic:
        torch.use_deterministic_algorithms(True)
    if world is None and spec.collective:
        from workers.parallel.process_group import World, own_device

        world = World(0, 1, own_device(0))
    loaded = ROLE_SPECS[spec.role].build(spec, spec.settings, _sharding_of(spec, world))
    loaded.world = world
    if spec.leased:
        loaded.offload()  # or the models of a pool would all be on its devices before the first has its turn
    return loaded
