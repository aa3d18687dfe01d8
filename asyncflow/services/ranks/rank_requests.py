"""Requests of a coordinator to its ranks: weights, state, code, layouts. All ranks carry them out; rank 0 answers.

Bytes don't pass the coordinator: the rank that has them stores them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from asyncflow.services.channels.endpoint import Payload, Store
from asyncflow.services.ranks.worker_factory import LoadedWorker
from protocols.control.requests import (
    Done,
    ExportModel,
    LoadState,
    PrepareCode,
    RankRequest,
    Reply,
    SaveState,
    SnapshotTaken,
    SwitchCode,
    SwitchLayout,
    TakeSnapshot,
    YieldDevices,
)

BESIDE_THE_MODEL = (PrepareCode, SwitchCode)  # a user's code is tried out without it, wherever it is


def carry_out(workplace: LoadedWorker, store: Store, request: RankRequest) -> tuple[Reply, list[Payload]]:
    """Do what is asked of a rank. Blocking; raises what its worker raises."""
    if isinstance(request, YieldDevices):
        return workplace.offload(), []
    if isinstance(request, PrepareCode | SwitchCode):
        _take_code(workplace.worker, request)
        return Done(), []
    workplace.reload()
    worker: Any = workplace.worker
    match request:
        case TakeSnapshot():
            taken = worker.snapshot(request.version)
            if taken is None:  # a rank beside the one that collects
                return Done(), []
            manifest, buffer = taken
            return SnapshotTaken(manifest), [store.put(buffer)]
        case SaveState():
            worker.save(request.folder)
        case LoadState():
            worker.load(request.folder)
        case ExportModel():
            worker.export(request.folder)
        case SwitchLayout():
            if request.to == "generation":
                took = worker.to_generation()  # None: there was nothing to bring
                values = msgspec.structs.asdict(took) if took is not None else {}
                return Done({name: float(value) for name, value in values.items()}), []
            worker.to_training()
    return Done(), []


def _take_code(worker: Any, request: PrepareCode | SwitchCode) -> None:
    """Of the workers that call a user's functions; the others have nothing to take."""
    if isinstance(request, PrepareCode) and (prepare := getattr(worker, "prepare_code", None)):
        prepare(request.sources)
    if isinstance(request, SwitchCode) and (switch := getattr(worker, "switch_code", None)):
        switch(request.take)


_ACTIVITIES = {
    TakeSnapshot: "publish",
    SaveState: "checkpoint",
    LoadState: "restore",
    ExportModel: "export",
    PrepareCode: "reload",
    SwitchCode: "reload",
    YieldDevices: "offload",
}


def activity_of(request: RankRequest) -> str:
    """What the timeline calls it."""
    return f"to_{request.to}" if isinstance(request, SwitchLayout) else _ACTIVITIES[type(request)]
