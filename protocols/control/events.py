"""Events of a run, from the controller to the programs and people that follow it."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocols.version import InstallReceipt, Version


class RunStarted(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The run has started, or was resumed."""

    run: str
    folder: str
    steps: int
    first_step: int = 0  # number of steps that were committed before
    term: int = 0
    services: list[str] = []
    warnings: list[str] = []  # of a resumed run: damaged checkpoints, a changed recipe


class StepCommitted(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A step is in the ledger. The fields are one line of metrics.jsonl."""

    step: int  # 1 for the first
    version: str
    seconds: float  # since the previous commit
    samples: int
    tokens_generated: int  # response tokens trained in this step
    reward_mean: float
    kl: float  # of mu to the reference, mean per token
    loss: float  # the policy's
    staleness_max: int  # versions
    staleness_mean: float
    metrics: dict[str, float] = {}  # everything else, by dotted name: "critic.loss", "wait.reward.score#1"


class SamplesShown(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A few samples of a committed step stand as text in samples.jsonl."""

    step: int
    samples: int


class Warned(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Something is probably not as it should be, and the run goes on."""

    step: int
    text: str


class Evaluated(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A point of one curve of the evaluation: the mean of a metric over held-out answers, or pass@k."""

    step: int
    metric: str  # the curve: "exact_match", "exact_match.pass@8", behind a set's name "math.exact_match"
    value: float
    samples: int  # answers that were scored


class CheckpointWritten(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A checkpoint is complete on disk."""

    step: int
    path: str
    seconds: float
    nbytes: int


class Published(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """New weights were published, and loaded by the engines of the receipts."""

    version: Version
    nbytes: int
    seconds: float
    receipts: list[InstallReceipt] = []


class SamplesEnded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Samples that finished without being trained."""

    state: Literal["dropped", "failed"]
    reason: str
    count: int


class ServiceReplaced(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A service's process died and was replaced. The replacement receives the unfinished rows again."""

    service: str
    number: int  # of this service's replacements so far
    cause: str
    seconds: float


class RolledBack(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Services with trained state died. The run goes on in a new term, from the state of an earlier step."""

    step: int  # from which it goes on
    lost_steps: int  # committed after it; they are made again
    term: int
    services: list[str]  # that died
    cause: str
    seconds: float  # from the death's discovery until all services were ready for the new term


class ServiceSilent(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A service's process exists and does not answer: it is stopped, or hangs."""

    service: str
    seconds: float
    ended: bool  # it is killed now, which is what a death of its own would be


class CodeReloaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """All services use these files' new code. Rows computed before `step` steps were committed used the old code."""

    step: int
    digests: dict[str, str]  # module -> blake2b-128 of its file


class CodeRefused(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Changed files could not be used, so no code changed."""

    step: int
    digests: dict[str, str]
    error: str


class StateChanged(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The run was paused, resumed, or is stopping."""

    state: Literal["running", "paused", "draining", "stopped"]


class WaitsChanged(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Who waits on whom now, for the live view."""

    waits: dict[str, str]  # stage -> "what on whom"
    live_prompts: int
    step_progress: float  # fraction of the current batch's prompts that are complete, 0 to 1
    tokens_per_second: float = 0.0


class Stalled(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The run made no progress for `seconds`. `graph`: the wait-for graph, one line per edge."""

    seconds: float
    graph: list[str]


class RunEnded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The last event of a run."""

    outcome: Literal["finished", "stopped", "failed"]
    step: int
    error: str = ""
    exit_code: int = 0  # 0 done, 1 failed, 3 broken invariant, 130 interrupted


Event = (
    RunStarted
    | StepCommitted
    | SamplesShown
    | Warned
    | Evaluated
    | CheckpointWritten
    | Published
    | SamplesEnded
    | ServiceReplaced
    | RolledBack
    | ServiceSilent
    | CodeReloaded
    | CodeRefused
    | StateChanged
    | WaitsChanged
    | Stalled
    | RunEnded
)
