"""ServiceSpec: all that a service needs to start. Plain values, which cross processes as msgpack.

What every service has are its identity and its limits. What only its role has stands in `settings`, one struct a role.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from protocols.layout.topology import Backend, GenerationGrouping, Topology, generation_grouping
from protocols.roles import Sampling
from protocols.stage import Grain
from workers.settings import Failures, Generation, Loss, Model, Optimizer

Fires = Literal["generate", "rows", "closed", "batch"]  # closed: joins and waits for CloseBatch; batch: trains on one


class Target(msgspec.Struct, frozen=True):
    """One consumer of a stage's output."""

    service: str
    edge: str
    ranks: int = 1


class StageSpec(msgspec.Struct, frozen=True):
    """One call site that the service answers."""

    name: str  # "critic.values#1"
    method: str
    fires: Fires
    inputs: list[str]  # edges by position, "critic.values#1.0"
    schemas: list[int]  # message type of each edge, by position
    sources: list[str]  # the stages behind the edges
    outputs: list[Target]
    protocol: str
    grains: list[Grain] = []  # of each edge, by position; of a closing stage
    whole_groups: bool = False  # a prompt's samples go to one rank
    balance: Literal["rows", "tokens"] = "rows"
    sampling: Sampling | None = None  # of a generating stage
    filter: str = ""  # of a closing stage: the worker's method that says which prompts are worth training
    filter_inputs: list[int] = []  # positions of the inputs that it takes

    @property
    def direct(self) -> bool:
        """Whether its consumers read its output themselves: a coordinator of several ranks only passes it on."""
        return all(target.ranks == 1 for target in self.outputs)


class PolicySettings(msgspec.Struct, frozen=True, tag="policy"):
    """A policy that trains, and generates where no generator is placed."""

    role: ClassVar[str] = "policy"
    model: Model
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    generation: Generation = Generation()
    tokenizer_path: str = ""
    pretrain: str = ""  # JSON lines of pretraining text, where the loss has a term of it


class GeneratorSettings(msgspec.Struct, frozen=True, tag="generator"):
    """An engine that generates with the policy's published weights."""

    role: ClassVar[str] = "generator"
    model: Model
    generation: Generation = Generation()
    tokenizer_path: str = ""


class CriticSettings(msgspec.Struct, frozen=True, tag="critic"):
    """A value model of the reward or of the cost."""

    model: Model
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    role: Literal["critic", "cost_critic"] = "critic"


class ReferenceSettings(msgspec.Struct, frozen=True, tag="reference"):
    """The frozen policy that the KL penalty compares with."""

    role: ClassVar[str] = "reference"
    model: Model
    loss: Loss = Loss()
    generation: Generation = Generation()


class ScorerSettings(msgspec.Struct, frozen=True, tag="scorer"):
    """A reward or a cost: a model, a rule, or a weighted sum of both."""

    model: Model
    tokens_per_micro_batch: int = Loss().tokens_per_micro_batch
    failures: Failures = Failures()
    tokenizer_path: str = ""
    role: Literal["reward", "cost"] = "reward"


class AdvantageSettings(msgspec.Struct, frozen=True, tag="advantage"):
    """The algorithm's batch function."""

    role: ClassVar[str] = "advantage"
    algorithm: str  # where the function comes from
    advantage_kwargs: dict[str, float | bool | str] = {}  # what it is called with, beside its inputs
    reward_parts: list[str] = []  # names of a mixed reward's parts, in their order


class ExternalSettings(msgspec.Struct, frozen=True, tag="external"):
    """A role that a worker outside of the run computes."""

    role: str
    failures: Failures = Failures()


class CustomSettings(msgspec.Struct, frozen=True, tag="custom"):
    """A worker class that is no role of an algorithm: of a benchmark, a calibration, a test."""

    role: str  # "package.module:Class"
    options: dict[str, str] = {}  # for the class to read


Settings = (
    PolicySettings
    | GeneratorSettings
    | CriticSettings
    | ReferenceSettings
    | ScorerSettings
    | AdvantageSettings
    | ExternalSettings
    | CustomSettings
)


class Limits(msgspec.Struct, frozen=True):
    """The bounds of what a service holds, sends and takes at once."""

    mailbox_rows: int  # capacity of a plain mailbox
    firing_rows: int  # most rows of one firing
    inline_bytes: int = 8192  # larger frames travel by reference
    object_bytes: int = 0  # of one object of a larger shard, where readers are on other nodes; 0: one object a shard
    shared_bytes: int = 0  # of the memory that processes of one node share, what each of them may hold at most
    threads: int = 1  # of torch


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One service of a run."""

    name: str
    settings: Settings
    limits: Limits
    run: str
    term: int
    seed: int
    deterministic: bool
    stages: list[StageSpec]
    samples_per_prompt: int
    pool: str
    leased: bool  # other services share the pool's devices
    accelerated: bool = False  # its ranks each have a device of their own, or a share of one
    topology: Topology = Topology()  # of its ranks
    generation_layout: Topology = Topology()  # p-t in which they generate, where they do
    backend: Backend = "3d"  # how ranks that work together share a model
    recompute: bool = False  # in training keep one activation per layer and recompute the others
    collective: bool = False  # its ranks work together, be it one alone: each takes every call, without rows too
    log_path: str = ""
    metrics_host: str = "127.0.0.1"  # address of the metrics endpoint; "node": the node's own
    delay_seconds: dict[str, float] = {}  # stage method -> injected delay, for experiments on timing

    @property
    def role(self) -> str:
        """What it computes: a role of the algorithm, "generator", "advantage", or "package.module:Class"."""
        return self.settings.role

    @property
    def external(self) -> bool:
        """Whether a worker outside of the run computes it."""
        return isinstance(self.settings, ExternalSettings)

    @property
    def grouping(self) -> GenerationGrouping:
        """Its ranks as they generate. Raises ValueError where the layout does not divide the topology."""
        return generation_grouping(self.backend, self.topology, self.generation_layout)

    @property
    def slots(self) -> int:
        """Rows that it generates at the same time; 0 where it does not generate."""
        settings = self.settings
        return settings.generation.slots if isinstance(settings, PolicySettings | GeneratorSettings) else 0


def effective_protocol(protocol: str, topology: Topology) -> str:
    """The transfer protocol by which a stage's rows reach the ranks of a topology.

    DP_PROTO is for ranks that hold the whole model each: where several share one, its rows go to all of them.
    """
    return "3D_PROTO" if protocol == "DP_PROTO" and topology.replica_size > 1 else protocol
