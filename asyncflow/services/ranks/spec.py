"""What a service is told when it starts: plain values that cross processes as msgpack."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocols.layout.topology import Backend, GenerationGrouping, Topology, generation_grouping
from protocols.roles import Sampling
from protocols.stage import Grain
from workers.settings import Failures, Generation, Loss, Model, Optimizer

# "policy", "generator", "critic", "cost_critic", "reference", "reward", "cost", "advantage", or "package.module:Class"
Kind = str
OUTSIDE: Kind = "outside"  # the rank of the role that the service is named after is outside of the run
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
        """Whether those who get its output read it themselves: a front of several ranks only passes it on."""
        return all(target.ranks == 1 for target in self.outputs)


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One service of a run."""

    name: str
    kind: Kind
    run: str
    term: int
    seed: int
    deterministic: bool
    stages: list[StageSpec]
    pool: str
    topology: str = "1-1-1"  # p-t-d of its ranks
    generation_layout: str = "1-1"  # p-t in which they generate, where they do
    backend: Backend = "3d"  # how ranks that work together share a model
    collective: bool = False  # its ranks work together, be it one alone: each takes every call, without rows too
    accelerated: bool = False  # its ranks each have a device of their own, or a share of one
    leased: bool  # other services share the pool's devices
    samples_per_prompt: int
    mailbox_rows: int  # capacity of a plain mailbox
    firing_rows: int  # most rows of one firing
    inline_bytes: int = 8192  # larger frames travel by reference
    object_bytes: int = 0  # of one object of a larger shard, where readers are on other nodes; 0: one object a shard
    shared_bytes: int = 0  # of the memory that processes of one node share, what each of them may hold at most
    threads: int = 1  # of torch
    model: Model = Model()
    tokenizer_path: str = ""
    loss: Loss = Loss()
    pretrain: str = ""  # JSON lines of pretraining text, where the loss has a term of it
    optimizer: Optimizer = Optimizer()
    generation: Generation = Generation()
    failures: Failures = Failures()
    algorithm: str = ""  # of the advantage service: where its batch function comes from
    reward_parts: list[str] = []  # of the advantage service: names of a mixed reward's parts, in their order
    numbers: dict[str, float | bool | str] = {}  # keyword arguments of the batch function
    log_path: str = ""
    metrics_host: str = "127.0.0.1"  # address of the metrics endpoint; "node": the node's own
    delay_seconds: dict[str, float] = {}  # stage method -> injected delay, for experiments on timing

    @property
    def grouping(self) -> GenerationGrouping:
        """Its ranks as they generate. Raises ValueError where the layout does not divide the topology."""
        return generation_grouping(self.backend, Topology.parse(self.topology), Topology.parse(self.generation_layout))


def effective_protocol(protocol: str, topology: Topology) -> str:
    """The transfer protocol by which a stage's rows reach the ranks of a topology.

    DP_PROTO is for ranks that hold the whole model each: where several share one, its rows go to all of them.
    """
    return "3D_PROTO" if protocol == "DP_PROTO" and topology.replica_size > 1 else protocol
