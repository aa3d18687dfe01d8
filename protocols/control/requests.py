"""Requests of a controller to a service, of a coordinator to its ranks, of a client to a service.

Small typed values, encoded by msgspec, that never carry a payload's bytes: those travel beside the message.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from protocols.control.code import CodeSource
from protocols.control.delivery import Shard
from protocols.roles import Sampling
from protocols.stage import Failure
from protocols.version import Version
from protocols.weights import WeightManifest


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
    """Write the worker's state after `step` committed steps into an existing folder."""

    folder: str
    step: int


class AbandonStep(msgspec.Struct, frozen=True, tag=True):
    """End the step that is training, and keep the state of the last committed one, which is saved next.

    It is carried out at once, beside the update that it ends. The run ends after it.
    """

    committed: int  # steps, since this process started


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


class BeginTerm(msgspec.Struct, frozen=True, tag=True):
    """A new term begins: drop rows, tokens and requests of the one before, and keep what is loaded.

    The reply comes when nothing of the old term is computed any more, and the model has left shared devices.
    """

    term: int


class SwitchLayout(msgspec.Struct, frozen=True, tag=True):
    """Coordinator to ranks: hold the weights in the layout for generation, or for training."""

    to: Literal["generation", "training"]


class PrepareCode(msgspec.Struct, frozen=True, tag=True):
    """Import new versions of modules beside the running ones, and check them; refused with the error they raise."""

    sources: list[CodeSource]


class SwitchCode(msgspec.Struct, frozen=True, tag=True):
    """Switch to the prepared code, or drop it."""

    take: bool


class Grant(msgspec.Struct, frozen=True, tag=True):
    """The pool's devices belong to this stage until it returns the lease."""

    ticket: int


class SetPaused(msgspec.Struct, frozen=True, tag=True):
    """Pause or resume generation; running rows keep their place."""

    paused: bool


class EndPrompts(msgspec.Struct, frozen=True, tag=True):
    """These prompts are trained, dropped or failed: their rows can go, and rows that still arrive are refused as late.

    `runs` [start, stop) of prompt ids are for a service that starts after they finished: it must refuse their rows.
    """

    prompts: list[int]
    runs: list[tuple[int, int]] = []


class Redeliver(msgspec.Struct, frozen=True, tag=True):
    """Send again what an edge may have lost with its consumer's process."""

    edge: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answer at once, beside whatever is computed: the service and all of its ranks are alive.

    The reply's values are the memory of its processes, `asyncflow.observe.memory`.
    """


class GetStatistics(msgspec.Struct, frozen=True, tag=True):
    """Ask what the service's channels did so far."""


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Keep what a stage sends from now on for a reader outside of the run."""

    stage: str


class NextRows(msgspec.Struct, frozen=True, tag=True):
    """Read what a subscription holds. The reply comes with the first rows, or empty after `seconds`."""

    number: int
    seconds: float


class Unsubscribe(msgspec.Struct, frozen=True, tag=True):
    """End a subscription."""

    number: int


class TakeRows(msgspec.Struct, frozen=True, tag=True):
    """An external worker takes unanswered rows. The reply comes with the first ones, or empty after `seconds`."""

    most: int  # rows
    seconds: float


class PutRows(msgspec.Struct, frozen=True, tag=True):
    """An external worker answers rows: values in the payloads, one payload a shard, and the rows that failed.

    Rows that the service has not requested yet wait until it does, for `seconds` at most.
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
    | AbandonStep
    | LoadState
    | ExportModel
    | PrepareCode
    | SwitchCode
    | YieldDevices
    | BeginTerm
    | Grant
    | SetPaused
    | EndPrompts
    | Redeliver
    | Ping
    | GetStatistics
    | Subscribe
    | NextRows
    | Unsubscribe
    | TakeRows
    | PutRows
)


# Requests of a coordinator to all of its ranks at once; rank 0 answers.
RankRequest = (
    TakeSnapshot
    | SaveState
    | AbandonStep
    | LoadState
    | ExportModel
    | PrepareCode
    | SwitchCode
    | YieldDevices
    | BeginTerm
    | SwitchLayout
    | Ping
)
