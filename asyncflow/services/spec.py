"""What a service is told when it starts: plain values that cross processes as msgpack."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocols.roles import Sampling
from workers.settings import Failures, Generation, Loss, Model, Optimizer

Kind = Literal["policy", "generator", "critic", "reference", "reward", "advantage"]
Fires = Literal["generate", "rows", "closed", "batch"]  # closed: joins and waits for CloseBatch; batch: trains on one


class Target(msgspec.Struct, frozen=True):
    """One consumer of a stage's output."""

    service: str
    edge: str


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
    sampling: Sampling | None = None  # of a generating stage


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
    leased: bool  # other services share the pool's devices
    samples_per_prompt: int
    mailbox_rows: int  # capacity of a plain mailbox
    firing_rows: int  # most rows of one firing
    inline_bytes: int = 8192  # larger frames travel by reference
    threads: int = 1  # of torch
    model: Model = Model()
    tokenizer_path: str = ""
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    generation: Generation = Generation()
    failures: Failures = Failures()
    algorithm: str = ""  # of the advantage service: where its batch function comes from
    numbers: dict[str, float | bool | str] = {}  # keyword arguments of the batch function
    log_path: str = ""
    metrics_host: str = "127.0.0.1"  # address of the metrics endpoint; "node": the node's own
    delay_seconds: dict[str, float] = {}  # stage method -> injected delay, for experiments on timing
