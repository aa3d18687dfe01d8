"""Every service may die: no sample is lost, whether a successor gets the open rows or what is trained rolls back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

import asyncflow
from asyncflow.control.store.ledger import Ledger
from asyncflow.observe.journal import read_lines
from protocols.control.events import RolledBack, ServiceReplaced, ServiceSilent, StepCommitted
from tests.asyncflow.conftest import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # seven processes that import torch, on a share of two cores


def process_of(service: str, folder: Path) -> int:
    """The process id that writes this log: a service's, or one of its ranks' ("reference-1")."""
    log = folder / "logs" / f"{service}.log"
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == log for file in process.open_files()) or _writes_to(process.pid, log):
                return process.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError(f"no process writes {log}")


def _writes_to(pid: int, log: Path) -> bool:
    return Path(f"/proc/{pid}/fd/1").exists() and Path(f"/proc/{pid}/fd/1").readlink() == log


@pytest.mark.usefixtures("ray_started")
async def test_every_service_may_die_in_one_run_and_costs_no_sample(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        steps=9,
        staleness=2,
        checkpoints={"every": 4},
        runtime="ray",
        deterministic=False,
        evaluation={"every": 1, "limit": 2},
        deadlines={"answer": 8.0},
        pools={"main": {}, "frozen": {"devices": 2}, "rollout": {}},
        placement={"reference": {"pool": "frozen", "parallel": "1-1-2"}, "generator": {"pool": "rollout"}},
        delays={"reward": {"score": 0.2}, "reference": {"log_probs": 0.2}},
    )
    # "reference-1" is one of two ranks, whose coordinator ends with it. The generator loses its weights and its rows,
    # the advantage those that it has joined. Two at a time save the start of a process each.
    faults = {
        1: {"reward": signal.SIGKILL, "advantage": signal.SIGKILL},
        2: {"reference-1": signal.SIGKILL, "evaluator": signal.SIGKILL},
        3: {"generator": signal.SIGKILL, "reward": signal.SIGSTOP},
    }
    trainers = ["policy", "critic"]  # they die when the stopped service is replaced, at step 5 or later
    rollbacks: list[RolledBack] = []
    replaced: list[ServiceReplaced] = []
    silent: list[str] = []
    async with asyncflow.launch(recipe) as run:
        async for event in run.events():
            match event:
                case StepCommitted():
                    for service, fault in faults.pop(event.step, {}).items():
                        os.kill(process_of(service, run.folder), fault)
                    while trainers and event.step >= 5 and ("reward", 2) in [(r.service, r.number) for r in replaced]:
                        os.kill(process_of(trainers.pop(), run.folder), signal.SIGKILL)
                case ServiceReplaced():
                    replaced.append(event)
                case RolledBack():
                    rollbacks.append(event)
                case ServiceSilent(ended=True):
                    silent.append(event.service)
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    assert sorted((r.service, r.number) for r in replaced) == [
        ("advantage", 1),
        ("evaluator", 1),
        ("generator", 1),
        ("reference", 1),
        ("reward", 1),
        ("reward", 2),
    ]
    assert silent == ["reward"], "who waits for it is not blamed"
    assert "reward: it had not answered for 8 s and was killed" in [r.cause for r in replaced]
    ((step, died),) = [(back.step, sorted(back.services)) for back in rollbacks]
    assert (step, died) == (4, ["critic", "policy"])
    evaluated = [line["step"] for line in read_lines(run.folder / "evaluations.jsonl")]
    assert evaluated == list(range(10)), "each version was evaluated once"
    ledger = Ledger(run.folder / "ledger.db")
    totals = ledger.totals()
    ledger.close()
    assert (totals.created, totals.trained, totals.live) == (9 * 4 * 2, 9 * 4 * 2, 0), "each sample was trained once"
