"""Requests from the coordinator to its ranks: weights, state, code, layouts. All ranks carry them out; rank 0 answers.

Weights don't pass through the coordinator: the rank that has them stores them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from asyncflow.services.channels.endpoint import Payload, Store
from asyncflow.services.ranks.loaded_worker import LoadedWorker
from protocols.control.replies import Done, Reply, SnapshotTaken
from protocols.control.requests import (
    AbandonStep,
    BeginTerm,
    ExportModel,
    LoadState,
    PrepareCode,
    RankRequest,
    SaveState,
    SwitchCode,
    SwitchLayout,
    TakeSnapshot,
    YieldDevices,
)

BESIDE_THE_MODEL = (PrepareCode, SwitchCode)  # requests that need no model on its device


def carry_out(loaded: LoadedWorker, store: Store, request: RankRequest) -> tuple[Reply, list[Payload]]:
    """Carry out a request on one rank. Blocking. Raises what the worker raises."""
    if isinstance(request, YieldDevices):
        return loaded.offload(), []
    if isinstance(request, PrepareCode | SwitchCode):
        _take_code(loaded.worker, request)
        return Done(), []
    loaded.onload()
    worker: Any = loaded.worker
    match request:
        case TakeSnapshot():
            taken = worker.snapshot(request.version)
            if taken is None:  # another rank gathers the weights
                return Done(), []
            manifest, buffer = taken
            return SnapshotTaken(manifest), [store.put(buffer)]
        case SaveState():
            trained = getattr(worker, "trained", None)
            if trained is not None and trained.version != request.step:
                raise ValueError(f"its state is of step {trained.version}, not of step {request.step}")
            worker.save(request.folder)
        case LoadState():
            worker.load(request.folder)
        case ExportModel():
            worker.export(request.folder)
        case SwitchLayout():
            if request.to == "generation":
                took = worker.to_generation()  # None: the engine has the current weights already
                values = msgspec.structs.asdict(took) if took is not None else {}
                return Done({name: float(value) for name, value in values.items()}), []
            worker.to_training()
    return Done(), []


def abandon(worker: Any, request: AbandonStep) -> None:
    """Have a worker give up the step that it trains. Does not block; may be called beside the worker's thread."""
    if (trained := getattr(worker, "trained", None)) is not None:
        trained.abandon()
    elif keep := getattr(worker, "keep_committed", None):
        keep(request.committed)


def _take_code(worker: Any, request: PrepareCode | SwitchCode) -> None:
    """Pass a change of code on to a worker that calls a user's functions; other workers ignore it."""
    if isinstance(request, PrepareCode) and (prepare := getattr(worker, "prepare_code", None)):
        prepare(request.sources)
    if isinstance(request, SwitchCode) and (switch := getattr(worker, "switch_code", None)):
        switch(request.take)


_ACTIVITIES = {
    TakeSnapshot: "publish",
    SaveState: "checkpoint",
    AbandonStep: "abandon",
    LoadState: "restore",
    ExportModel: "export",
    PrepareCode: "reload",
    SwitchCode: "reload",
    YieldDevices: "offload",
    BeginTerm: "begin_term",
}


def activity_of(request: RankRequest) -> str:
    """The request's name in the timeline."""
    return f"to_{request.to}" if isinstance(request, SwitchLayout) else _ACTIVITIES[type(request)]


def described(request: RankRequest) -> str:
    """The request in words, for a log."""
    match request:
        case TakeSnapshot():
            return f"publish of version {request.version}"
        case SaveState() | LoadState() | ExportModel():
            return f"{activity_of(request)}, in {request.folder},"
        case _:
            return activity_of(request)
