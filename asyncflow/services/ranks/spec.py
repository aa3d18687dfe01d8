"""ServiceSpec: everything a service needs to start, as plain values that cross processes as msgpack.

Its own fields are what every service has: identity, placement, limits. `settings` is what its worker reads.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from asyncflow.observe.settings import SampleTable
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
    sources: list[str]  # the stages that send on the edges
    outputs: list[Target]
    protocol: str
    grains: list[Grain] = []  # closing stage: the grain of each edge, by position
    whole_groups: bool = False  # all samples of a prompt go to one rank
    balance: Literal["rows", "tokens"] = "rows"
    sampling: Sampling | None = None  # of a generating stage
    filter: str = ""  # closing stage: the worker's method that decides which prompts are trainable
    filter_inputs: list[int] = []  # the positions of that method's inputs

    @property
    def direct(self) -> bool:
        """Whether its consumers read its output themselves: a coordinator of several ranks only passes it on."""
        return all(target.ranks == 1 for target in self.outputs)


class ModelSettings(msgspec.Struct, frozen=True, tag="model"):
    """A role that has a model: the sections of the recipe that workers read. Each role reads what it needs."""

    role: str  # a row of ROLE_SPECS
    model: Model  # or the rules in its place, or an external worker
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    generation: Generation = Generation()
    failures: Failures = Failures()
    tokenizer_path: str = ""
    pretrain: str = ""  # a file or folder of pretraining text, if the loss has a pretraining term
    skip_overlong: bool = False  # leave out the rows of that text that exceed the context


class AdvantageSettings(msgspec.Struct, frozen=True, tag="advantage"):
    """The algorithm's batch function."""

    role: ClassVar[str] = "advantage"
    algorithm: str  # where the function comes from
    advantage_kwargs: dict[str, float | bool | str] = {}  # further arguments of the function
    partial_groups: bool = False  # a prompt may be trained without the samples that failed
    samples: SampleTable = SampleTable()  # that are shown as text
    tokenizer_path: str = ""  # of these texts; "": none are shown


class CustomSettings(msgspec.Struct, frozen=True, tag="custom"):
    """A worker class that is no role of an algorithm, as in a benchmark, a calibration or a test."""

    role: str  # "package.module:Class"
    options: dict[str, str] = {}  # for the class to read


Settings = ModelSettings | AdvantageSettings | CustomSettings


class Limits(msgspec.Struct, frozen=True):
    """The bounds on the rows, bytes and threads of a service."""

    mailbox_rows: int  # capacity of a plain mailbox
    firing_rows: int  # the most rows of one firing
    inline_bytes: int = 8192  # larger frames travel by reference
    object_bytes: int = 0  # size of the objects of a shard, if readers are on other nodes; 0: one object per shard
    shared_bytes: int = 0  # the shared memory of a node that each process may hold
    threads: int = 1  # torch's threads


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One service of a run."""

    name: str
    settings: Settings
    limits: Limits
    run: str
    term: int = 0
    seed: int = 0
    deterministic: bool = False
    code: list[str] = []  # folders of the user's own modules
    stages: list[StageSpec] = []
    samples_per_prompt: int = 1
    pool: str = ""  # "": no device
    leased: bool = False  # other services share the pool's devices
    accelerated: bool = False  # its ranks run on accelerators
    topology: Topology = Topology()  # of its ranks
    generation_layout: Topology = Topology()  # the p-t in which its ranks generate, if they do
    backend: Backend = "3d"  # how collective ranks share a model
    recompute: bool = False  # in training keep one activation per layer and recompute the others
    collective: bool = False  # its ranks compute together, so each takes part in every call, even without rows
    log_path: str = ""
    metrics_host: str = "127.0.0.1"  # address of the metrics endpoint; "node": the node's address
    delay_seconds: dict[str, float] = {}  # stage method -> injected delay, for experiments on timing

    @property
    def role(self) -> str:
        """A role of the algorithm, "generator", "advantage", or "package.module:Class"."""
        return self.settings.role

    @property
    def external(self) -> bool:
        """Whether external workers compute it."""
        return isinstance(self.settings, ModelSettings) and self.settings.model.outside

    @property
    def grouping(self) -> GenerationGrouping:
        """The grouping of its ranks for generation. Raises ValueError if the layout does not divide the topology."""
        return generation_grouping(self.backend, self.topology, self.generation_layout)

    @property
    def slots(self) -> int:
        """The number of rows that its engine generates at the same time; 0 without a model."""
        return self.settings.generation.slots if isinstance(self.settings, ModelSettings) else 0


def effective_protocol(protocol: str, topology: Topology) -> str:
    """The transfer protocol that distributes a stage's rows over the ranks of a topology.

    DP_PROTO is for ranks that each hold the whole model. If several ranks share one, its rows go to all of them.
    """
    return "3D_PROTO" if protocol == "DP_PROTO" and topology.replica_size > 1 else protocol
