"""Workers of ranks that work together, and of one alone on an accelerator: the table from a kind of service to them.

Those that train take the service's backend, which says how replicas share a model's state
(`workers.parallel.backends`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asyncflow.services.ranks.spec import Kind, ServiceSpec
from protocols.layout.topology import Topology
from workers.data.hf_folder import family_of
from workers.parallel.plan import FAMILIES

if TYPE_CHECKING:
    from workers.parallel.process_group import World
    from workers.roles.parallel_critic import ParallelCritic

Builder = Callable[[ServiceSpec, "World"], Any]


def _policy(spec: ServiceSpec, world: World) -> Any:
    from workers.data.pretraining import text_of
    from workers.roles.parallel_policy import ParallelPolicy

    generates = any(stage.fires == "generate" for stage in spec.stages)
    return ParallelPolicy(
        spec.model,
        Topology.parse(spec.topology),
        spec.loss,
        spec.optimizer,
        spec.generation,
        spec.seed,
        grouping=spec.grouping if generates else None,
        backend=spec.backend,
        device=world.device,
        pretraining=text_of(spec.loss, spec.pretrain, spec.tokenizer_path, spec.seed),
        engine=spec.generation.engine,
        sleeps=spec.leased,
    )


def _critic(spec: ServiceSpec, world: World) -> Any:
    from workers.roles.parallel_critic import ParallelCritic

    return _critic_of(ParallelCritic, spec, world)


def _cost_critic(spec: ServiceSpec, world: World) -> Any:
    from workers.roles.parallel_critic import ParallelCostCritic

    return _critic_of(ParallelCostCritic, spec, world)


def _critic_of(worker: type[ParallelCritic], spec: ServiceSpec, world: World) -> ParallelCritic:
    topology, settings = Topology.parse(spec.topology), (spec.loss, spec.optimizer, spec.seed)
    return worker(spec.model, topology, *settings, backend=spec.backend, device=world.device)


def _reference(spec: ServiceSpec, world: World) -> Any:
    from workers.roles.parallel_answers import ParallelReference

    topology = Topology.parse(spec.topology)
    return ParallelReference(spec.model, topology, spec.loss, spec.generation, device=world.device)


def _reward(spec: ServiceSpec, world: World) -> Any:
    from workers.roles.parallel_answers import ParallelReward

    budget = spec.loss.tokens_per_micro_batch
    return ParallelReward(spec.model, Topology.parse(spec.topology), budget, device=world.device)


def _cost(spec: ServiceSpec, world: World) -> Any:
    from workers.roles.parallel_answers import ParallelCost

    budget = spec.loss.tokens_per_micro_batch
    return ParallelCost(spec.model, Topology.parse(spec.topology), budget, device=world.device)


_BUILDERS: dict[Kind, Builder] = {
    "policy": _policy,
    "critic": _critic,
    "cost_critic": _cost_critic,
    "reference": _reference,
    "reward": _reward,
    "cost": _cost,
}


def on_device(spec: ServiceSpec) -> bool:
    """Whether a rank that works by itself computes on an accelerator, as all of a 1-1-1 model.

    The classes for one process keep to the CPU. What has no other has those: rules, adapters, families that no plan
    cuts, and a policy that draws row by row with torch's engine.
    """
    model = spec.model
    return (
        spec.accelerated
        and spec.kind in _BUILDERS
        and not (model.rule or model.mix or model.lora.rank)
        and family_of(model.path) in FAMILIES
        and not any(stage.fires == "generate" for stage in spec.stages)
    )


def worker_of(spec: ServiceSpec, world: World) -> Any:
    """One rank's worker. Blocking: loads its part of the model. Raises LookupError for a kind that has none."""
    if spec.kind not in _BUILDERS:
        raise LookupError(
            f"service {spec.name}: no worker for a {spec.kind} on {spec.topology} ranks that work together; "
            f"there is one for {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[spec.kind](spec, world)
