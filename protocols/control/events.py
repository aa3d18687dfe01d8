"""What a controller tells the people and programs that follow a run."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocols.weights import InstallReceipt, Version


class RunStarted(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    run: str
    folder: str
    steps: int
    first_step: int = 0  # steps already committed when it (re)started
    term: int = 0
    services: list[str] = []
    warnings: list[str] = []  # what a resumed run found and went on without: damaged checkpoints, a changed recipe


class StepCommitted(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One step is in the ledger; the fields are the line of metrics.jsonl."""

    step: int  # 1 after the first
    version: str
    seconds: float  # since the previous commit
    samples: int
    tokens_generated: int  # response tokens trained in this step
    reward_mean: float
    kl: float  # mean per token of mu to the reference
    loss: float  # the policy's
    staleness_max: int  # versions
    staleness_mean: float
    metrics: dict[str, float] = {}  # everything else, by dotted name: "critic.loss", "wait.reward.score#1"


class Evaluated(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    step: int
    metric: str
    value: float
    samples: int


class CheckpointWritten(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    step: int
    path: str
    seconds: float
    nbytes: int


class Published(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    version: Version
    nbytes: int
    seconds: float
    receipts: list[InstallReceipt] = []


class SamplesEnded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Samples that ended other than trained."""

    state: Literal["dropped", "failed"]
    reason: str
    count: int


class ServiceReplaced(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A service's process died; another one took its place and is sent again what it had not finished."""

    service: str
    number: int  # of its replacements
    cause: str
    seconds: float


class CodeReloaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Every service runs these files' new text; rows that were done before `step` committed steps are of the old."""

    step: int
    digests: dict[str, str]  # module -> blake2b-128 of its file


class CodeRefused(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Files were not taken, and nothing changed: whose they are and what is wrong with them."""

    step: int
    digests: dict[str, str]
    error: str


class StateChanged(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    state: Literal["running", "paused", "draining", "stopped"]


class WaitsChanged(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Who waits on whom now, for the live view: stage -> "what on whom"."""

    waits: dict[str, str]
    live_prompts: int
    step_progress: float  # share of the current batch's prompts that are settled, 0 to 1
    tokens_per_second: float = 0.0


class Stalled(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Nothing has moved for `seconds`: the wait-for graph, a line an edge."""

    seconds: float
    graph: list[str]


class RunEnded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    outcome: Literal["finished", "stopped", "failed"]
    step: int
    error: str = ""
    exit_code: int = 0  # 0 done, 1 failed, 3 broken invariant, 130 interrupted


Event = (
    RunStarted
    | StepCommitted
    | Evaluated
    | CheckpointWritten
    | Published
    | SamplesEnded
    | ServiceReplaced
    | CodeReloaded
    | CodeRefused
    | StateChanged
    | WaitsChanged
    | Stalled
    | RunEnded
)
