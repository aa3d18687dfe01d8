"""No tracker can stop, slow or crash a run: what is given to it, once, and what happens where it fails or hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from asyncflow.observe.exporter import Exporter
from asyncflow.observe.journal import MetricsJournal
from asyncflow.observe.settings import Observe
from asyncflow.observe.trackers import tracking
from asyncflow.observe.trackers.registry import TRACKERS
from asyncflow.observe.trackers.tracker import TrackedRun
from asyncflow.observe.trackers.tracking import Tracking, record_of
from protocols.control.events import Evaluated, Event, RolledBack, RunStarted, SamplesShown, StepCommitted
from protocols.control.samples import SampleLine, ShownSample
from tests.asyncflow.observe.test_journal import committed
from tests.asyncflow.observe.trackers import tracked


class Recording:
    """A tracker that remembers what it is given."""

    def __init__(self, *, shown: int | None = None, before: Callable[[str], None] = lambda call: None) -> None:
        """`shown` is what `start` returns; `before` each call: may raise, or wait."""
        self.calls: list[tuple[Any, ...]] = []
        self.runs: list[TrackedRun] = []
        self._shown, self._before = shown, before

    def start(self, run: TrackedRun) -> int | None:
        self._before("start")
        self.runs.append(run)
        return self._shown

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._before("log")
        self.calls.append((step, dict(metrics)))

    def texts(self, step: int, rows: Sequence[ShownSample]) -> None:
        self._before("texts")
        self.calls.append((step, list(rows)))

    def close(self) -> None:
        self._before("close")
        self.calls.append(("closed",))

    def steps(self, name: str) -> list[int]:
        return [step for step, content in self.calls[:-1] if name in content]


STARTED = RunStarted(run="sums-1", folder="", steps=9)


async def show(
    folder: Path, tracker: Recording, *events: Event, monkeypatch: pytest.MonkeyPatch, first_step: int = 0
) -> tuple[list[str], list[str]]:
    """Give events to a tracker; its warnings, and what it lacks."""
    monkeypatch.setitem(TRACKERS, "mlflow", lambda: tracker)
    made = Tracking(Observe(trackers=["mlflow"]), folder, tracked.RECIPE, Exporter("controller"))
    warnings: list[str] = []
    made.follow(_none(), warnings.append)
    made.take(RunStarted(run="sums-1", folder=str(folder), steps=9, first_step=first_step))
    for event in events:
        made.take(event)
    lacks = await made.close(seconds=10.0)
    await asyncio.sleep(0)  # for the warnings that were passed on to this loop
    return warnings, lacks


async def _none() -> AsyncIterator[tuple[int, Event]]:
    for event in list[tuple[int, Event]]():
        yield event


def steps(*numbers: int) -> list[StepCommitted]:
    return [committed(number, **{"policy.loss": float(number)}) for number in numbers]


def evaluated(step: int) -> Evaluated:
    return Evaluated(step=step, metric="exact_match.pass@8", value=0.5, samples=8)


def test_a_step_becomes_finite_numbers_by_grouped_names():
    record = record_of(committed(3, **{"policy.loss": 0.5, "wait.reward.score#1": 2.0, "critic.loss": float("nan")}))
    assert record is not None
    assert (record.curve, record.step) == ("metrics", 3)
    assert record.metrics["policy/loss"] == 0.5
    assert record.metrics["wait/reward.score#1"] == 2.0
    assert record.metrics["reward_mean"] == 0.25
    assert record.metrics.keys().isdisjoint({"step", "version", "critic/loss"})
    assert record_of(STARTED) is None
    assert record_of(Evaluated(step=1, metric="m", value=float("inf"), samples=1)) is None


async def test_a_tracker_gets_steps_evaluations_and_texts_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    MetricsJournal(tmp_path / "samples.jsonl").append(SampleLine(step=1, rows=tracked.SAMPLES[1:]))
    tracker = Recording()
    events = [*steps(1), SamplesShown(step=1, samples=1), evaluated(1), *steps(2)]
    warnings, lacks = await show(tmp_path, tracker, *events, monkeypatch=monkeypatch)
    assert (warnings, lacks) == ([], [])
    assert [call[0] for call in tracker.calls] == [1, 1, 1, 2, "closed"]
    assert tracker.calls[1] == (1, tracked.SAMPLES[1:])
    assert tracker.calls[2] == (1, {"evaluation/exact_match.pass@8": 0.5})
    [run] = tracker.runs
    assert (run.name, run.project, run.recipe, len(run.id)) == ("sums-1", "asyncflow", tracked.RECIPE, 16)


async def test_a_resumed_run_is_the_same_run_and_logs_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = Recording(), Recording()
    await show(tmp_path, first, *steps(1, 2), evaluated(2), *steps(3), monkeypatch=monkeypatch)
    again = [*steps(2), evaluated(2), *steps(3), evaluated(3), *steps(4)]
    await show(tmp_path, second, *again, monkeypatch=monkeypatch, first_step=1)
    assert (first.steps("policy/loss"), second.steps("policy/loss")) == ([1, 2, 3], [4])
    assert second.steps("evaluation/exact_match.pass@8") == [3], "it was not logged before"
    assert first.runs[0].id == second.runs[0].id
    assert second.runs[0].first_step == 1


async def test_a_tracker_that_takes_steps_back_gets_those_of_the_new_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    second = Recording(shown=1)
    await show(tmp_path, Recording(shown=0), *steps(1, 2, 3), monkeypatch=monkeypatch)
    await show(tmp_path, second, *steps(2, 3, 4), monkeypatch=monkeypatch, first_step=1)
    assert second.steps("policy/loss") == [2, 3, 4]


async def test_a_failing_tracker_is_reported_once_and_tried_again_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left = iter([False, True, True, False])

    def fail(call: str) -> None:
        if call == "log" and next(left):
            raise ConnectionError("no route to the server")

    tracker = Recording(before=fail)
    warnings, lacks = await show(tmp_path, tracker, *steps(1, 2, 3, 4), monkeypatch=monkeypatch)
    assert tracker.steps("policy/loss") == [1, 4]
    assert warnings == [
        "tracker mlflow: ConnectionError: no route to the server; the run goes on without what it misses"
    ]
    assert lacks == ["tracker mlflow: 2 records were dropped"]


async def test_a_tracker_that_could_not_start_gets_everything_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.001)
    left, ready = iter([True, True, False]), threading.Event()

    def fail(call: str) -> None:
        if call == "start":
            if next(left):
                raise OSError("down")
            ready.set()

    tracker = Recording(before=fail)
    monkeypatch.setitem(TRACKERS, "mlflow", lambda: tracker)
    made = Tracking(Observe(trackers=["mlflow"]), tmp_path, tracked.RECIPE, Exporter("controller"))
    warnings: list[str] = []
    made.follow(_none(), warnings.append)
    for event in [STARTED, *steps(1, 2)]:
        made.take(event)
    assert await asyncio.to_thread(ready.wait, 10.0)
    assert await made.close() == []
    assert tracker.steps("policy/loss") == [1, 2]
    assert len(warnings) == 1


async def test_a_tracker_that_never_starts_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(call: str) -> None:
        if call == "start":
            raise OSError("down")

    tracker = Recording(before=fail)
    _, lacks = await show(tmp_path, tracker, *steps(1, 2, 3), monkeypatch=monkeypatch)
    assert lacks == ["tracker mlflow: 3 records were dropped"]
    assert tracker.calls == [("closed",)]


async def test_a_tracker_that_hangs_costs_the_run_nothing_but_what_its_queue_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    released = threading.Event()
    tracker = Recording(before=lambda call: released.wait() if call == "log" else None)  # type: ignore[arg-type]
    monkeypatch.setattr(tracking, "QUEUE_RECORDS", 5)
    monkeypatch.setitem(TRACKERS, "mlflow", lambda: tracker)
    exporter = Exporter("controller")
    made = Tracking(Observe(trackers=["mlflow"]), tmp_path, tracked.RECIPE, exporter)
    made.follow(_none(), lambda text: None)
    made.take(STARTED)
    start = time.monotonic()
    for event in steps(*range(1, 101)):
        made.take(event)
    [lacks] = await made.close(seconds=0.05)
    assert time.monotonic() - start < 5.0
    assert "is left behind" in lacks
    dropped = int(lacks.split()[2])
    assert 94 <= dropped <= 100, "all but the one that it hangs in, and how many its thread took before"
    released.set()


async def test_a_damaged_memory_shows_the_run_as_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = Recording(), Recording()
    await show(tmp_path, first, *steps(1), monkeypatch=monkeypatch)
    (tmp_path / "trackers" / "mlflow.json").write_text("{")
    await show(tmp_path, second, *steps(1), monkeypatch=monkeypatch)
    assert second.steps("policy/loss") == [1]
    assert first.runs[0].id != second.runs[0].id


async def test_a_run_that_goes_on_from_an_earlier_step_is_as_one_that_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    back = RolledBack(step=1, lost_steps=2, term=1, services=["policy"], cause="killed", seconds=2.0)
    for folder, shown, wanted in ((tmp_path / "a", None, [1, 2, 3, 4]), (tmp_path / "b", 1, [1, 2, 3, 2, 3, 4])):
        tracker = Recording(shown=shown)
        await show(folder, tracker, *steps(1, 2, 3), back, *steps(2, 3, 4), monkeypatch=monkeypatch)
        assert [step for step, *_ in tracker.calls if step != "closed"] == wanted
        assert [run.first_step for run in tracker.runs] == [0, 1]
