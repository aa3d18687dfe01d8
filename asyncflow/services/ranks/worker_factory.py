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
from asyncflow.services.ranks.parallel_workplace import on_device, worker_of
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
    residence: Offloader | None = None  # of a model that can leave its device to others

    def method(self, name: str) -> Callable[..., Any]:
        """A stage method of the worker. Raises AttributeError."""
        return getattr(self.worker, name)

    def reload(self) -> None:
        """Have the model on its device, for work."""
        if self.residence is not None:
            self.residence.reload()

    def leave(self) -> Done:
        """Free the device's memory, where the model can leave it."""
        moves = self.residence is not None and self.residence.moves
        return Done({"moves": float(moves), "bytes": float(self.residence.leave() if self.residence else 0)})

    def close(self) -> None:
        """Free what the worker and the engine hold."""
        if self.engine is not None:
            self.engine.close()
        if close := getattr(self.worker, "close", None):
            close()
        if self.world is not None:
            self.world.leave()


def _policy(spec: ServiceSpec, settings: PolicySettings) -> LoadedWorker:
    from workers.data.pretraining import text_of
    from workers.generation.in_place import load_in_place
    from workers.roles.policy import PolicyWorker

    text = text_of(settings.loss, settings.pretrain, settings.tokenizer_path, spec.seed)
    worker = PolicyWorker(settings.model, settings.loss, settings.optimizer, settings.generation, spec.seed, text)
    if not any(s.fires == "generate" for s in spec.stages):
        return LoadedWorker(worker)
    engine = worker.engine(spec.term)
    return LoadedWorker(worker, engine, lambda: load_in_place(engine, Version(spec.term, worker.trained.version)))


def _generator(spec: ServiceSpec, settings: GeneratorSettings) -> LoadedWorker:
    return LoadedWorker(None, _engine(spec, settings))


def _engine(spec: ServiceSpec, settings: GeneratorSettings) -> Engine:
    if settings.generation.engine == "vllm":
        from workers.generation.vllm import VllmEngine

        end = end_of_sequence(settings.tokenizer_path)
        return VllmEngine(settings.model.path, settings.generation, spec.seed, settings.model.dtype, end)
    from workers.generation.torch import TorchEngine
    from workers.training.models import load_causal

    model = load_causal(settings.model.path, settings.model.dtype)
    return TorchEngine(model, settings.generation, spec.seed, end_of_sequence(settings.tokenizer_path))


def _critic(spec: ServiceSpec, settings: CriticSettings) -> LoadedWorker:
    from workers.roles.critic import CriticWorker

    return LoadedWorker(CriticWorker(settings.model, settings.loss, settings.optimizer, spec.seed))


def _cost_critic(spec: ServiceSpec, settings: CriticSettings) -> LoadedWorker:
    from workers.roles.critic import CostCriticWorker

    return LoadedWorker(CostCriticWorker(settings.model, settings.loss, settings.optimizer, spec.seed))


def _reference(spec: ServiceSpec, settings: ReferenceSettings) -> LoadedWorker:
    from workers.roles.reference import ReferenceWorker

    return LoadedWorker(ReferenceWorker(settings.model, settings.loss, settings.generation))


def _reward(spec: ServiceSpec, settings: ScorerSettings) -> LoadedWorker:
    from workers.roles.reward import MixedReward, ModelReward, RuleReward

    if settings.model.mix:
        return LoadedWorker(
            MixedReward(settings.model, settings.tokenizer_path, settings.tokens_per_micro_batch, settings.failures)
        )
    if settings.model.rule:
        return LoadedWorker(RuleReward(settings.model, settings.tokenizer_path, settings.failures))
    return LoadedWorker(ModelReward(settings.model, settings.tokens_per_micro_batch))


def _cost(spec: ServiceSpec, settings: ScorerSettings) -> LoadedWorker:
    from workers.roles.cost import ModelCost, RuleCost

    if settings.model.rule:
        return LoadedWorker(RuleCost(settings.model, settings.tokenizer_path, settings.failures))
    return LoadedWorker(ModelCost(settings.model, settings.tokens_per_micro_batch))


def _advantage(spec: ServiceSpec, settings: AdvantageSettings) -> LoadedWorker:
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


_BUILDERS: dict[str, Callable[[ServiceSpec, Any], LoadedWorker]] = {
    "policy": _policy,
    "generator": _generator,
    "critic": _critic,
    "cost_critic": _cost_critic,
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


_WITH_TORCH = ("policy", "generator", "critic", "cost_critic", "reference")


def build(spec: ServiceSpec, rank: int = 0, world: World | None = None) -> LoadedWorker:
    """Build the worker of one of a service's ranks; `world`: of several that work together. Blocking: loads models."""
    if spec.role not in _BUILDERS:
        return LoadedWorker(_own(spec.role)(spec, rank), world=world)
    if spec.role in _WITH_TORCH or (isinstance(spec.settings, ScorerSettings) and spec.settings.model.folders):
        import torch

        torch.set_num_threads(spec.limits.threads)
        if spec.deterministic:
            torch.use_deterministic_algorithms(True)
    if world is None and (spec.collective or on_device(spec)):
        from workers.parallel.process_group import World, own_device

        spec, world = msgspec.structs.replace(spec, topology=Topology()), World(0, 1, own_device(0))
    if world is not None:
        worker = worker_of(spec, world)
        together = world if spec.collective else None
        workplace = LoadedWorker(worker, world=together, residence=worker.residence)
        if spec.leased:
            workplace.leave()  # or the models of a pool would all be on its devices before the first has its turn
        return workplace
    return _BUILDERS[spec.role](spec, spec.settings)
