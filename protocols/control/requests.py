"""Requests of a controller to a service, of a coordinator to its ranks, of a client to a service, and the replies.

Small typed values, encoded by msgspec, that never carry a payload's bytes: those travel beside the message.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from protocols.control.delivery import RankCall, ServiceStatistics, Shard
from protocols.roles import Sampling
from protocols.stage import Failure
from protocols.weights import InstallReceipt, Version, WeightManifest


class CodeSource(msgspec.Struct, frozen=True):
    """One module of the user's own code, whole, so that every service runs the same text wherever it is."""

    module: str  # dotted name
    path: str  # where it was read, for tracebacks
    text: str


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
    """Coordinator to ranks: hold the weights in the layout for generation, or for training."""

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


# Requests of a coordinator to all of its ranks at once; rank 0 answers.
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
