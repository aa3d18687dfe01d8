"""Requests that need the model reload it to the device first; the other requests leave it offloaded."""

from __future__ import annotations

import pytest
import torch

from asyncflow.services.ranks.loaded_worker import LoadedWorker
from asyncflow.services.ranks.rank_requests import carry_out
from asyncflow.services.runtime.local_store import LocalStore
from protocols.control.requests import ExportModel, PrepareCode, RankRequest, SaveState, SwitchCode, YieldDevices
from workers.training.offload import Offloader

BYTES = 8


class Worker:
    """A worker without user code and with empty state."""

    def __init__(self, offloader: Offloader) -> None:
        self.offloader = offloader

    def save(self, folder: str) -> None: ...
    def export(self, folder: str) -> None: ...


@pytest.mark.parametrize(
    ("request_", "there"),
    [
        (SaveState("", 0), True),
        (ExportModel(""), True),
        (PrepareCode([]), False),
        (SwitchCode(True), False),
        (YieldDevices(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_requests_that_need_the_model_reload_it(request_: RankRequest, there: bool):
    offloader = Offloader(torch.device("cuda"), lambda _: BYTES)
    offloader.offload()
    store = LocalStore()
    carry_out(LoadedWorker(Worker(offloader)), store, request_)
    store.close()
    assert offloader.onload() == (0 if there else BYTES)
