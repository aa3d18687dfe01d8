"""Every process of a run dies at every moment of its work, in one run on Ray, and every sample is accounted for."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

import asyncflow
from asyncflow.recipe.config import Recipe, to_recipe
from asyncflow.services import failpoints
from protocols.control.events import Event, Published, RolledBack, ServiceReplaced, StepCommitted
from tests.asyncflow.faults.invariants import check_finished, check_versions

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(7200)]

FAULT_SECONDS = 600.0  # from arming a place until the run has gone on, on a busy machine


class Fault(NamedTuple):
    """A process that dies, or stops, when it reaches a moment."""

    process: str
    moment: str
    what: str = "kill"

    @property
    def service(self) -> str:
        return self.process.split("-", maxsplit=1)[0]


REPLACED = [
    Fault("generator", "generating"),
    Fault("generator", "generated"),
    Fault("generator", "load"),
    Fault("generator", "generating", "stop"),
    Fault("reference-1", "taken"),
    Fault("reference", "computed"),
    Fault("reward", "taken"),
    Fault("reward", "computed"),
    Fault("reward", "taken", "stop"),
    Fault("cost", "computed"),
]
ROLLED_BACK = [
    Fault("policy", "training"),
    Fault("policy-1", "training"),
    Fault("policy-0", "trained"),
    Fault("policy-1", "publish"),
    Fault("policy-0", "checkpoint"),
    Fault("critic", "training"),
    Fault("critic", "trained"),
    Fault("critic", "checkpoint"),
    Fault("critic", "computed"),
    Fault("cost_critic", "trained"),
    Fault("advantage", "closing"),  # it has a multiplier, which is trained
    Fault("advantage", "checkpoint"),
]


@pytest.fixture
def armed(tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of failpoints, which the processes of a Ray that the run starts inherit."""
    folder = tmp_path / "failpoints"
    folder.mkdir()
    monkeypatch.setenv(failpoints.VARIABLE, str(folder))
    monkeypatch.setattr(failpoints, "_FOLDER", "")  # this process, the controller's, is not to die
    return folder


@pytest.fixture
def recipe(table: dict[str, Any]) -> Recipe:
    """Safe-RLHF at staleness 2 with all roles, the policy on two fully sharded ranks, the reference on two replicas."""
    models = table["models"] | {
        "cost": {"rule": "tests.asyncflow.pipeline.rules:varied"},
        "cost_critic": table["models"]["critic"],
    }
    own: dict[str, Any] = {
        "algorithm": "safe_rlhf",
        "steps": 400,  # it is stopped before
        "staleness": 2,
        "deterministic": False,
        "runtime": "ray",
        "models": models,
        "advantage": {"cost_limit": -0.5, "multiplier_rate": 0.5, "cost_window": 12},
        "checkpoints": {"every": 3},
        "failures": {"restarts": 1000},
        "deadlines": {"stall": 120.0, "give_up": 600.0, "answer": 10.0},
        "pools": {"train": {"devices": 2}, "rollout": {}, "frozen": {"devices": 2}, "main": {}},
        "placement": {
            "policy": {"pool": "train", "parallel": "1-1-2", "backend": "fsdp"},
            "generator": {"pool": "rollout"},
            "reference": {"pool": "frozen", "parallel": "1-1-2"},
        },
    }
    return to_recipe(table | own)


Versions = list[tuple[int, int]]  # (term, step)


async def until(events: AsyncIterator[Event], wanted: Callable[[Event], bool], versions: Versions) -> Event:
    """The next event that is wanted; the published versions on the way are noted."""
    async for event in events:
        if isinstance(event, Published):
            versions.append((event.version.term, event.version.step))
        if wanted(event):
            return event
    raise AssertionError("the run ended")


async def test_every_process_may_die_at_every_moment(recipe: Recipe, armed: Path) -> None:
    versions: Versions = []
    table: list[str] = []
    async with asyncflow.launch(recipe) as run:
        events = run.events()
        await until(events, lambda event: isinstance(event, StepCommitted) and event.step >= 2, versions)
        for fault in [*REPLACED, *ROLLED_BACK]:
            began = time.monotonic()
            async with asyncio.timeout(FAULT_SECONDS):
                place = failpoints.arm(armed, *fault)

                def consequence(event: Event, fault: Fault = fault) -> bool:
                    if isinstance(event, ServiceReplaced):
                        return fault in REPLACED and event.service == fault.service
                    return isinstance(event, RolledBack) and fault in ROLLED_BACK and fault.service in event.services

                event = await until(events, consequence, versions)
                assert isinstance(event, ServiceReplaced | RolledBack)
                await until(events, lambda event: isinstance(event, StepCommitted), versions)
            assert not place.exists()
            lost = f"{event.lost_steps} steps" if isinstance(event, RolledBack) else "none"
            seconds = time.monotonic() - began
            table.append(f"{'.'.join(fault[:2]):24} {fault.what:5} {event.seconds:6.1f} {seconds:8.1f}  {lost}")
        ended = await run.stop()
    print("\nfault                    how    down s  to the next step s  lost", *table, sep="\n", file=sys.stderr)
    assert (ended.outcome, ended.exit_code) == ("stopped", 130), ended.error
    check_versions(versions)
    # The same run to its end, so that every sample has one.
    async with asyncflow.resume(run.folder, overrides=[f"steps={ended.step + 2}"]) as resumed:
        assert (await resumed.wait()).outcome == "finished"
    counted = check_finished(run.folder, replace(recipe, steps=ended.step + 2))
    print(len(table), "faults,", counted, file=sys.stderr)
