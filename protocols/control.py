"""Control messages and events: small typed values, encoded by msgspec, that never carry a payload's bytes.

Three families: `Request` and `Reply` are what a controller asks of a service; `Notice` is what a service reports
to its controller; `Event` is what a controller tells the people and programs that follow a run. Payloads, where
there are any, travel beside the message.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from protocols.code import CodeSource
from protocols.delivery import RankCall, ServiceStatistics, Shard
from protocols.roles import Sampling
from protocols.stage import Failure
from protocols.weights import InstallReceipt, Version, WeightManifest


class Span(msgspec.Struct, frozen=True):
    """A stretch of time of one service, for the timeline and the idle-time accounts."""

    service: str
    activity: str  # the stage ("policy.update#1"), "publish", "load", "checkpoint"
    start: float  # seconds, time.time()
    end: float
    rows: int = 0
    step: int = -1  # the step it belongs to, -1 where rows of several mix


# --- requests: controller -> service, each with its reply


class CloseBatch(msgspec.Struct, frozen=True, tag=True):
    """Turn exactly these rows, in this order, into the experience of a step and send it to the trainers."""

    step: int
    sample_ids: list[int]


class TakeSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Copy the policy's canonical weights: the reply's payload."""

    version: Version


class LoadWeights(msgspec.Struct, frozen=True, tag=True):
    """Install the payload's weights."""

    manifest: WeightManifest


class Invoke(msgspec.Struct, frozen=True, tag=True):
    """Call a stage's method directly on the rows of the payloads, outside the dataflow."""

    method: str
    shards: list[Shard]
    sampling: Sampling | None = None


class SaveState(msgspec.Struct, frozen=True, tag=True):
    """Write the worker's state into an existing folder."""

    folder: str


class LoadState(msgspec.Struct, frozen=True, tag=True):
    """Restore the worker's state from a checkpoint's folder."""

    folder: str


class ExportModel(msgspec.Struct, frozen=True, tag=True):
    """Write a transformers folder."""

    folder: str


class YieldDevices(msgspec.Struct, frozen=True, tag=True):
    """Another service is about to have the pool's devices: free their memory until the next call.

    The reply's `moves` is 0 where there is nothing that could be moved, now or later, else 1.
    """


class SwitchLayout(msgspec.Struct, frozen=True, tag=True):
    """A front tells its ranks to hold their weights as they generate, or as they train."""

    to: Literal["generation", "training"]


class PrepareCode(msgspec.Struct, frozen=True, tag=True):
    """Make modules anew beside the running ones, and try them out; refused with the error that they raise."""

    sources: list[CodeSource]


class SwitchCode(msgspec.Struct, frozen=True, tag=True):
    """Take what was prepared from now on, or drop it."""

    take: bool


class Grant(msgspec.Struct, frozen=True, tag=True):
    """The pool's devices are the asker's until it returns them."""

    ticket: int


class SetPaused(msgspec.Struct, frozen=True, tag=True):
    """Stop or go on drawing; running rows keep their place."""

    paused: bool


class EndPrompts(msgspec.Struct, frozen=True, tag=True):
    """These prompts are trained, dropped or failed: nobody needs their rows, and what still comes of them is late.

    `runs` [start, stop) are for a service that starts after they ended: it has no row of them, and must take none.
    """

    prompts: list[int]
    runs: list[tuple[int, int]] = []


class Redeliver(msgspec.Struct, frozen=True, tag=True):
    """Send again what an edge may have lost with its consumer's process."""

    edge: str


class GetStatistics(msgspec.Struct, frozen=True, tag=True):
    """Ask what the service's channels did so far."""


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Keep what a stage sends from now on for an outside reader."""

    stage: str


class NextRows(msgspec.Struct, frozen=True, tag=True):
    """What a subscription holds; the reply comes with the first rows, or empty after `seconds`."""

    number: int
    seconds: float


class Unsubscribe(msgspec.Struct, frozen=True, tag=True):
    """The reader has left."""

    number: int


class TakeRows(msgspec.Struct, frozen=True, tag=True):
    """An outside worker takes rows without an answer; the reply comes with the first ones, or empty after `seconds`."""

    most: int  # rows
    seconds: float


class PutRows(msgspec.Struct, frozen=True, tag=True):
    """An outside worker answers rows: values in the payloads, one a shard, and those that could not be done.

    Rows that nobody has asked for yet wait until somebody does, for `seconds` at most.
    """

    shards: list[Shard] = []
    failures: list[Failure] = []
    lost: list[int] = []  # samples whose bytes were gone when the worker wanted to read them
    seconds: float = 0.0


Request = (
    CloseBatch
    | TakeSnapshot
    | LoadWeights
    | Invoke
    | SaveState
    | LoadState
    | ExportModel
    | PrepareCode
    | SwitchCode
    | YieldDevices
    | Grant
    | SetPaused
    | EndPrompts
    | Redeliver
    | GetStatistics
    | Subscribe
    | NextRows
    | Unsubscribe
    | TakeRows
    | PutRows
)


# What a front asks of its ranks, of all at once: the answer is that of rank 0.
RankRequest = (
    TakeSnapshot | SaveState | LoadState | ExportModel | PrepareCode | SwitchCode | YieldDevices | SwitchLayout
)


class Done(msgspec.Struct, frozen=True, tag=True):
    """Nothing to say but that it is done; measurements where there are some."""

    values: dict[str, float] = {}


class SnapshotTaken(msgspec.Struct, frozen=True, tag=True):
    manifest: WeightManifest


class Installed(msgspec.Struct, frozen=True, tag=True):
    receipt: InstallReceipt


class Invoked(msgspec.Struct, frozen=True, tag=True):
    """The rows are in the payloads, these could not be done."""

    shards: list[Shard] = []
    failures: list[Failure] = []


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request was not done, and why."""

    error: str


class Statistics(msgspec.Struct, frozen=True, tag=True):
    statistics: ServiceStatistics


class Subscribed(msgspec.Struct, frozen=True, tag=True):
    """The subscription's name in further requests."""

    number: int


class Rows(msgspec.Struct, frozen=True, tag=True):
    """What a stage sent, in its order, one payload a shard; `missed` rows before it were given up for the reader."""

    shards: list[Shard] = []
    missed: int = 0


class RowsTaken(msgspec.Struct, frozen=True, tag=True):
    """An outside worker's part of a firing, as a rank's is, its sources in the payloads; None: nothing is asked."""

    call: RankCall | None = None


class RowsPut(msgspec.Struct, frozen=True, tag=True):
    """What became of the rows that were put: those named neither here nor there were taken."""

    refused: dict[int, str] = {}  # sample -> why: it was answered already, or nobody needs it any more
    waiting: list[int] = []  # samples that nobody asked for in time


Reply = Done | SnapshotTaken | Installed | Invoked | Statistics | Subscribed | Rows | RowsTaken | RowsPut | Refused


class RankAnswer(msgspec.Struct, frozen=True):
    """What one rank did about a request, and when."""

    start: float  # seconds, time.time()
    end: float
    reply: Reply


# --- notices: service -> controller


class Settled(msgspec.Struct, frozen=True, tag=True):
    """All rows of a prompt reached the join: alive, or dead with a cause."""

    prompt_id: int
    alive: list[int]  # sample ids
    dead: list[Failure]
    oldest_version: int = 0  # oldest step among the prompt's tokens
    critic_version: int = -1  # oldest critic step among its values; -1 without a critic
    tokens: int = 0  # response tokens of the rows that are alive
    reward_sum: float = 0.0  # sum of their scores
    cost_sum: float | None = None  # sum of their costs; None where the algorithm has none
    worth: bool = True  # False: alive, and the algorithm's filter has no use for it; the join has let it go


class Generated(msgspec.Struct, frozen=True, tag=True):
    """Rows left the engine, for the ledger and the token counters."""

    sample_ids: list[int]
    tokens: int


class RowsLost(msgspec.Struct, frozen=True, tag=True):
    """Rows that a stage had taken in can't be read any more: their sender's process is gone, and they with it."""

    stage: str
    sample_ids: list[int]


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """A sink finished one batch."""

    stage: str
    step: int
    values: dict[str, float] = {}


class Busy(msgspec.Struct, frozen=True, tag=True):
    """Time spent, reported in small groups."""

    spans: list[Span]


class LeaseAsked(msgspec.Struct, frozen=True, tag=True):
    """A stage with all its inputs in hand asks for its pool's devices."""

    ticket: int
    stage: str


class LeaseReturned(msgspec.Struct, frozen=True, tag=True):
    """It gives them back, before it sends or publishes anything."""

    ticket: int


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """Who waits for what since when; `what` empty: not any more. Feeds the live view and the wait-for graph."""

    who: str
    what: str = ""
    on: str = ""
    since: float = 0.0


class ServiceFailed(msgspec.Struct, frozen=True, tag=True):
    """A stage raised: the run can't go on as it is."""

    service: str
    stage: str
    error: str


Notice = Settled | Generated | RowsLost | StepDone | Busy | LeaseAsked | LeaseReturned | Waiting | ServiceFailed


# --- events: controller -> client


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
