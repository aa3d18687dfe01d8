"""What a service works with, built inside its own process: the one table from a service's kind to its worker.

Heavy imports stand inside the constructors, so that a process imports only what its own kind needs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from asyncflow.services.ranks.apply_functions import ApplyFunctions
from asyncflow.services.ranks.spec import (
    AdvantageSettings,
    CriticSettings,
    GeneratorSettings,
    PolicySettings,
    ReferenceSettings,
    ScorerSettings,
    ServiceSpec,
)
from protocols.control.requests import Done
from protocols.layout.topology import Topology
from protocols.roles import Cost, Critic, Policy, Reference, Reward
from protocols.stage import StageContract, contract_of
from protocols.weights import Version
from workers.data.hf_folder import end_of_sequence
from workers.generation.engine import Engine
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.user_code import module_of

if TYPE_CHECKING:
    from types import ModuleType

    from asyncflow.dataflow.graph import Stage
    from workers.parallel.process_group import World
    from workers.training.offload import Offloader


class LoadedWorker(msgspec.Struct):
    """A worker, and the engine where its service generates."""

    worker: Any
    engine: Engine | None = None
    load_trained: Callable[[], None] | None = None  # for an engine that shares the trained model: its newest version
    world: World | None = None  # the other ranks, where they work together

    @property
    def offloader(self) -> Offloader | None:
        """Moves the worker's model off its device; None where it has no model."""
        return getattr(self.worker, "offloader", None)

    def method(self, name: str) -> Callable[..., Any]:
        """A stage method of the worker. Raises AttributeError."""
        return getattr(self.worker, name)

    def reload(self) -> None:
        """Have the model on its device, for work."""
        if self.offloader is not None:
            self.offloader.reload()

    def offload(self) -> Done:
        """Free the device's memory, where the model can leave it."""
        moves = self.offloader is not None and self.offloader.moves
        return Done({"moves": float(moves), "bytes": float(self.offloader.offload() if self.offloader else 0)})

    def close(self) -> None:
        """Free what the worker and the engine hold."""
        if self.engine is not None:
            self.engine.close()
        if close := getattr(self.worker, "close", None):
            close()
        if self.world is not None:
            self.world.leave()


def _policy(spec: ServiceSpec, settings: PolicySettings, sharding: Sharding) -> LoadedWorker:
    from workers.data.pretraining import text_of
    from workers.generation.in_place import load_in_place
    from workers.roles.policy import PolicyWorker

    generates = any(stage.fires == "generate" for stage in spec.stages)
    worker = PolicyWorker(
        settings.model,
        settings.loss,
        settings.optimizer,
        settings.generation,
        spec.seed,
        text_of(settings.loss, settings.pretrain, settings.tokenizer_path, spec.seed),
        sharding=sharding,
        grouping=spec.grouping if generates and spec.collective else None,
        sleeps=spec.leased,
    )
    if not generates or spec.collective:
        return LoadedWorker(worker)
    engine = worker.engine(spec.term)
    return LoadedWorker(worker, engine, lambda: load_in_place(engine, Version(spec.term, worker.trained.version)))


def _generator(spec: ServiceSpec, settings: GeneratorSettings, sharding: Sharding) -> LoadedWorker:
    model, generation, end = settings.model, settings.generation, end_of_sequence(settings.tokenizer_path)
    if generation.engine == "vllm":
        from workers.generation.vllm import VllmEngine

        return LoadedWorker(None, VllmEngine(model.path, generation, spec.seed, model.dtype, end))
    import torch

    from workers.generation.torch import TorchEngine
    from workers.training.models import load_causal

    module = load_causal(model.path, model.dtype)
    torch.nn.Module.to(module, torch.device(sharding.device))
    return LoadedWorker(None, TorchEngine(module, generation, spec.seed, end))


def _critic(spec: ServiceSpec, settings: CriticSettings, sharding: Sharding) -> LoadedWorker:
    from workers.roles.critic import CostCriticWorker, CriticWorker

    kind = CostCriticWorker if settings.role == "cost_critic" else CriticWorker
    return LoadedWorker(kind(settings.model, settings.loss, settings.optimizer, spec.seed, sharding=sharding))


def _reference(spec: ServiceSpec, settings: ReferenceSettings, sharding: Sharding) -> LoadedWorker:
    from workers.roles.reference import ReferenceWorker

    return LoadedWorker(ReferenceWorker(settings.model, settings.loss, settings.generation, sharding=sharding))


def _reward(spec: ServiceSpec, settings: ScorerSettings, sharding: Sharding) -> LoadedWorker:
    from workers.roles.reward import MixedReward, ModelReward, RuleReward

    model, tokenizer, budget = settings.model, settings.tokenizer_path, settings.tokens_per_micro_batch
    if model.mix:
        return LoadedWorker(MixedReward(model, tokenizer, budget, settings.failures, sharding=sharding))
    if model.rule:
        return LoadedWorker(RuleReward(model, tokenizer, settings.failures))
    return LoadedWorker(ModelReward(model, budget, sharding=sharding))


def _cost(spec: ServiceSpec, settings: ScorerSettings, sharding: Sharding) -> LoadedWorker:
    from workers.roles.cost import ModelCost, RuleCost

    if settings.model.rule:
        return LoadedWorker(RuleCost(settings.model, settings.tokenizer_path, settings.failures))
    return LoadedWorker(ModelCost(settings.model, settings.tokens_per_micro_batch, sharding=sharding))


def _advantage(spec: ServiceSpec, settings: AdvantageSettings, sharding: Sharding) -> LoadedWorker:
    from asyncflow.dataflow.registry import algorithm_named
    from asyncflow.dataflow.retrace import retraced
    from asyncflow.dataflow.steering import with_steering
    from asyncflow.dataflow.trace import declaration_of, trace

    algorithm = algorithm_named(settings.algorithm)
    dataflow, declared = with_steering(trace(algorithm), settings.advantage_kwargs), declaration_of(algorithm)

    def remake(module: ModuleType) -> Stage:
        return retraced(module, settings.algorithm, settings.advantage_kwargs, dataflow, declared).batch_stage

    return LoadedWorker(
        ApplyFunctions(dataflow.batch_stage, module_of(settings.algorithm), remake, settings.advantage_kwargs)
    )


_BUILDERS: dict[str, Callable[[ServiceSpec, Any, Sharding], LoadedWorker]] = {
    "policy": _policy,
    "generator": _generator,
    "critic": _critic,
    "cost_critic": _critic,
    "reference": _reference,
    "reward": _reward,
    "cost": _cost,
    "advantage": _advantage,
}


_ROLES: dict[str, type] = {
    "policy": Policy,
    "generator": Policy,
    "critic": Critic,
    "cost_critic": Critic,
    "reference": Reference,
    "reward": Reward,
    "cost": Cost,
}


@functools.cache
def contract_for(role: str, method: str) -> StageContract:
    """What a stage of such a service takes and gives. Raises LookupError naming the stages that it has."""
    return contract_of(_ROLES.get(role) or _own(role), method)


def _own(role: str) -> type:
    """A worker class of the user's own, "package.module:Class". Raises LookupError where there is none."""
    module, _, name = role.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"no role {role!r}: {error}; want one of {', '.join(_BUILDERS)}, or module:Class") from None


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
    """Build the worker of one of a service's ranks; `world`: of several that work together. Blocking: loads models."""
    if spec.role not in _BUILDERS:
        return LoadedWorker(_own(spec.role)(spec, rank), world=world)
    model = getattr(spec.settings, "model", None)
    if model is None or not model.folders:  # it does without torch
        return _BUILDERS[spec.role](spec, spec.settings, ONE_DEVICE)
    import torch

    torch.set_num_threads(spec.limits.threads)
    if spec.deterministic:
        torch.use_deterministic_algorithms(True)
    if world is None and spec.collective:
        from workers.parallel.process_group import World, own_device

        world = World(0, 1, own_device(0))
    loaded = _BUILDERS[spec.role](spec, spec.settings, _sharding_of(spec, world))
    loaded.world = world
    if spec.leased:
        loaded.offload()  # or the models of a pool would all be on its devices before the first has its turn
    return loaded
