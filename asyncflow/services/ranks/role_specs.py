"""The registry of roles: one row per role, with its contract, the head of its model, and its builder.

A new role is a row here, its contract in `protocols.roles`, and a class in `workers.roles`. Heavy imports stand inside
the builders, so that a process imports only what its own role needs, and a recipe is checked without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncflow.services.ranks.apply_functions import ApplyFunctions
from asyncflow.services.ranks.loaded_worker import LoadedWorker
from asyncflow.services.ranks.spec import (
    AdvantageSettings,
    ModelSettings,
    ServiceSpec,
)
from protocols.roles import ROLES
from protocols.weights import Version
from workers.data.vocabulary import Vocabulary
from workers.parallel.plan import Head
from workers.parallel.sharding import Sharding
from workers.user_code import module_of

if TYPE_CHECKING:
    from types import ModuleType

    from asyncflow.dataflow.graph import Stage


def _policy(spec: ServiceSpec, settings: ModelSettings, sharding: Sharding) -> LoadedWorker:
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
        text_of(
            settings.loss,
            settings.pretrain,
            settings.tokenizer_path,
            spec.seed,
            skip_overlong=settings.skip_overlong,
        ),
        sharding=sharding,
        grouping=spec.grouping if generates and spec.collective else None,
        sleeps=spec.leased,
    )
    if not generates or spec.collective:
        return LoadedWorker(worker)
    engine = worker.engine(spec.term)
    return LoadedWorker(worker, engine, lambda: load_in_place(engine, Version(spec.term, worker.trained.version)))


def _generator(spec: ServiceSpec, settings: ModelSettings, sharding: Sharding) -> LoadedWorker:
    model, generation, vocabulary = settings.model, settings.generation, Vocabulary.of(settings.tokenizer_path)
    if generation.engine == "vllm":
        from workers.generation.vllm import VllmEngine

        return LoadedWorker(None, VllmEngine(model.path, generation, spec.seed, model.dtype, vocabulary))
    import torch

    from workers.generation.torch import TorchEngine
    from workers.training.models import load_causal

    module = load_causal(model.path, model.dtype, model.attention)
    torch.nn.Module.to(module, torch.device(sharding.device))
    return LoadedWorker(None, TorchEngine(module, generation, spec.seed, vocabulary))


def _critic(spec: ServiceSpec, settings: ModelSettings, sharding: Sharding) -> LoadedWorker:
    from workers.roles.critic import CostCriticWorker, CriticWorker

    kind = CostCriticWorker if settings.role == "cost_critic" else CriticWorker
    return LoadedWorker(kind(settings.model, settings.loss, settings.optimizer, spec.seed, sharding=sharding))


def _reference(spec: ServiceSpec, settings: ModelSettings, sharding: Sharding) -> LoadedWorker:
    from workers.roles.reference import ReferenceWorker

    vocabulary = Vocabulary.of(settings.tokenizer_path or settings.model.path)
    return LoadedWorker(
        ReferenceWorker(settings.model, settings.loss, settings.generation, vocabulary=vocabulary, sharding=sharding)
    )


def _scorer(spec: ServiceSpec, settings: ModelSettings, sharding: Sharding) -> LoadedWorker:
    from workers.roles.cost import CostWorker
    from workers.roles.reward import RewardWorker

    kind, budget = CostWorker if settings.role == "cost" else RewardWorker, settings.loss.tokens_per_micro_batch
    return LoadedWorker(kind(settings.model, budget, settings.tokenizer_path, settings.failures, sharding=sharding))


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


class RoleSpec(NamedTuple):
    """What is particular to a role."""

    build: Callable[[ServiceSpec, Any, Sharding], LoadedWorker]
    contract: type | None = None  # of `protocols.roles`; None: its stages are the algorithm's own functions
    head: Head = "tokens"  # on top of its model
    trains: bool = False

    @property
    def scores(self) -> bool:
        """Whether it scores responses: with a model, a rule, or in an external worker."""
        return self.head == "score"

    @property
    def replicable(self) -> bool:
        """Whether replicas of its model need not work together, because they only answer."""
        return self.contract is not None and not self.trains


ROLE_SPECS: dict[str, RoleSpec] = {
    "policy": RoleSpec(_policy, ROLES["policy"], trains=True),
    "generator": RoleSpec(_generator, ROLES["policy"]),
    "critic": RoleSpec(_critic, ROLES["critic"], "value", trains=True),
    "cost_critic": RoleSpec(_critic, ROLES["cost_critic"], "value", trains=True),
    "reference": RoleSpec(_reference, ROLES["reference"]),
    "reward": RoleSpec(_scorer, ROLES["reward"], "score"),
    "cost": RoleSpec(_scorer, ROLES["cost"], "score"),
    "advantage": RoleSpec(_advantage),
}
