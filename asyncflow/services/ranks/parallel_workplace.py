"""Workers of ranks that work together, and of one alone on an accelerator: the table from a kind of service to them.

Those that train take the service's backend, which says how replicas share a model's state
(`workers.parallel.backends`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asyncflow.services.ranks.spec import (
    CriticSettings,
    PolicySettings,
    ReferenceSettings,
    ScorerSettings,
    ServiceSpec,
)
from workers.data.hf_folder import family_of
from workers.parallel.plan import FAMILIES

if TYPE_CHECKING:
    from workers.parallel.process_group import World
    from workers.roles.parallel_critic import ParallelCritic

Builder = Callable[[ServiceSpec, Any, "World"], Any]


def _policy(spec: ServiceSpec, settings: PolicySettings, world: World) -> Any:
    from workers.data.pretraining import text_of
    from workers.roles.parallel_policy import ParallelPolicy

    generates = any(stage.fires == "generate" for stage in spec.stages)
    return ParallelPolicy(
        settings.model,
        spec.topology,
        settings.loss,
        settings.optimizer,
        settings.generation,
        spec.seed,
        grouping=spec.grouping if generates else None,
        backend=spec.backend,
        device=world.device,
        pretraining=text_of(settings.loss, settings.pretrain, settings.tokenizer_path, spec.seed),
        engine=settings.generation.engine,
        sleeps=spec.leased,
    )


def _critic(spec: ServiceSpec, settings: CriticSettings, world: World) -> Any:
    from workers.roles.parallel_critic import ParallelCritic

    return _critic_of(ParallelCritic, spec, settings, world)


def _cost_critic(spec: ServiceSpec, settings: CriticSettings, world: World) -> Any:
    from workers.roles.parallel_critic import ParallelCostCritic

    return _critic_of(ParallelCostCritic, spec, settings, world)


def _critic_of(
    worker: type[ParallelCritic], spec: ServiceSpec, settings: CriticSettings, world: World
) -> ParallelCritic:
    given = settings.loss, settings.optimizer, spec.seed
    return worker(settings.model, spec.topology, *given, backend=spec.backend, device=world.device)


def _reference(spec: ServiceSpec, settings: ReferenceSettings, world: World) -> Any:
    from workers.roles.parallel_answers import ParallelReference

    return ParallelReference(settings.model, spec.topology, settings.loss, settings.generation, device=world.device)


def _reward(spec: ServiceSpec, settings: ScorerSettings, world: World) -> Any:
    from workers.roles.parallel_answers import ParallelReward

    budget = settings.tokens_per_micro_batch
    return ParallelReward(settings.model, spec.topology, budget, device=world.device)


def _cost(spec: ServiceSpec, settings: ScorerSettings, world: World) -> Any:
    from workers.roles.parallel_answers import ParallelCost

    budget = settings.tokens_per_micro_batch
    return ParallelCost(settings.model, spec.topology, budget, device=world.device)


_BUILDERS: dict[str, Builder] = {
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
    settings = spec.settings
    if not isinstance(settings, PolicySettings | CriticSettings | ReferenceSettings | ScorerSettings):
        return False
    model = settings.model
    return (
        spec.accelerated
        and not (model.rule or model.mix or model.lora.rank)
        and family_of(model.path) in FAMILIES
        and not any(stage.fires == "generate" for stage in spec.stages)
    )


def worker_of(spec: ServiceSpec, world: World) -> Any:
    """One rank's worker. Blocking: loads its part of the model. Raises LookupError for a kind that has none."""
    if spec.role not in _BUILDERS:
        raise LookupError(
            f"service {spec.name}: no worker for a {spec.role} on {spec.topology} ranks that work together; "
            f"there is one for {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[spec.role](spec, spec.settings, world)
