"""Offloading frees the device of weights and moments, and training continues after reloading."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.gpu.conftest import Figure
from tests.gpu.test_transition import make
from tests.workers.batches import experience, rollouts
from tests.workers.ranks import own_device
from workers.parallel.sharding import Sharding
from workers.roles.critic import CriticWorker
from workers.roles.policy import PolicyWorker
from workers.roles.reference import ReferenceWorker
from workers.settings import Generation, Loss, Model, Optimizer

ROUNDS = 3
ROLES = ["policy", "critic", "reference"]  # reward and cost models are held like a reference


def worker_of(role: str, folder: str, device: torch.device) -> PolicyWorker | CriticWorker | ReferenceWorker:
    model, on, loss = Model(path=folder, learning_rate=1e-4), Sharding(device=device), Loss()
    match role:
        case "policy":
            return PolicyWorker(model, loss, Optimizer(), Generation(engine="torch"), 3, sharding=on)
        case "critic":
            return CriticWorker(model, loss, Optimizer(), 3, sharding=on)
        case _:
            return ReferenceWorker(model, loss, Generation(), sharding=on)


def work(worker: PolicyWorker | CriticWorker | ReferenceWorker) -> None:
    if isinstance(worker, ReferenceWorker):
        worker.log_probs(rollouts(experience(5)))
    else:
        worker.update(experience(5))


@pytest.mark.parametrize("role", ROLES)
def test_a_role_frees_its_device_and_works_on(kind: str, role: str, tmp_path: Path, figure: Figure):
    make(str(tmp_path), kind)
    device = own_device(kind)
    worker = worker_of(role, str(tmp_path), device)
    work(worker)
    times = 1 if role == "reference" else 3  # weights; and two moments
    weights = sum(tensor.nbytes for tensor in worker.model.parameters.values())
    moved = left = 0
    started = away = back = 0.0
    for _ in range(ROUNDS):
        held = torch.cuda.memory_allocated(device) if kind == "cuda" else 0
        started = time.perf_counter()
        moved = worker.offloader.offload()
        away = time.perf_counter()
        left = torch.cuda.memory_allocated(device) if kind == "cuda" else 0
        assert worker.offloader.onload() == moved
        back = time.perf_counter()
        work(worker)
        assert moved == (times * weights if kind == "cuda" else 0)
        assert held - left >= moved
    if kind == "cuda":
        figure(f"{role}: bytes that leave", moved, "bytes")
        figure(f"{role}: left on the device", left, "bytes")
        figure(f"{role}: to the host", moved / (away - started) / 1e9, "GB/s")
        figure(f"{role}: back", moved / (back - away) / 1e9, "GB/s")
