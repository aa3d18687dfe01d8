"""Replies to requests: of a service, and of one of its ranks to its coordinator."""

from __future__ import annotations

import msgspec

from protocols.control.delivery import RankCall, ServiceStatistics, Shard
from protocols.control.samples import ShownSample
from protocols.stage import Failure
from protocols.version import InstallReceipt
from protocols.weights import WeightManifest


class Done(msgspec.Struct, frozen=True, tag=True):
    """The request was carried out; `values`: measurements, where there are any."""

    values: dict[str, float] = {}


class BatchClosed(msgspec.Struct, frozen=True, tag=True):
    """The batch is on its way to the trainers; `samples`: a few of it as text, at the steps that the recipe wants."""

    values: dict[str, float] = {}  # measurements
    samples: list[ShownSample] = []


class SnapshotTaken(msgspec.Struct, frozen=True, tag=True):
    """The weights are in the payload."""

    manifest: WeightManifest


class Installed(msgspec.Struct, frozen=True, tag=True):
    """The engine has installed and verified the weights."""

    receipt: InstallReceipt


class Invoked(msgspec.Struct, frozen=True, tag=True):
    """The output rows are in the payloads; `failures`: the rows that failed."""

    shards: list[Shard] = []
    failures: list[Failure] = []


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request failed; `error` says why."""

    error: str


class Statistics(msgspec.Struct, frozen=True, tag=True):
    """The counts of a service's channels."""

    statistics: ServiceStatistics


class Subscribed(msgspec.Struct, frozen=True, tag=True):
    """The subscription exists; `number` names it in further requests."""

    number: int


class Rows(msgspec.Struct, frozen=True, tag=True):
    """What a stage sent, in order, one payload a shard; `missed`: earlier rows that were dropped for this reader."""

    shards: list[Shard] = []
    missed: int = 0


class RowsTaken(msgspec.Struct, frozen=True, tag=True):
    """An external worker's part of a firing, like a rank's, with its frames in the payloads; None: no rows wait."""

    call: RankCall | None = None


class RowsPut(msgspec.Struct, frozen=True, tag=True):
    """The rows that were not accepted; all others were."""

    refused: dict[int, str] = {}  # sample -> why: it was answered already, or its prompt is finished
    waiting: list[int] = []  # samples that the service did not request in time


Reply = (
    Done
    | BatchClosed
    | SnapshotTaken
    | Installed
    | Invoked
    | Statistics
    | Subscribed
    | Rows
    | RowsTaken
    | RowsPut
    | Refused
)


class RankAnswer(msgspec.Struct, frozen=True):
    """One rank's reply to a request, and when it worked."""

    start: float  # seconds, time.time()
    end: float
    reply: Reply
