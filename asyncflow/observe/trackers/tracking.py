"""Tracking: a run's events go to its trackers, each in a thread of its own behind a bounded queue.

    events ──take──> one queue a tracker ──> thread: start, log, texts, close ──> TensorBoard, W&B, ...

`take` never waits: a record for which there is no room is dropped and counted. A tracker that fails is reported once;
the record is dropped, and the next one is tried. One that can't start is started again, ever less often. What was
logged of each curve stands in trackers/NAME.json of the run's folder, so a resumed run logs no step twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from asyncflow.observe.exporter import Exporter
from asyncflow.observe.journal import line_of, replace_file, whole_lines
from asyncflow.observe.settings import Observe
from asyncflow.observe.trackers.registry import make_tracker
from asyncflow.observe.trackers.tracker import TrackedRun, Tracker
from protocols.control.events import Evaluated, Event, RolledBack, RunStarted, SamplesShown, StepCommitted
from protocols.control.samples import SampleLine

QUEUE_RECORDS = 500  # of one tracker; then records are dropped
CLOSE_SECONDS = 30.0  # that a run's end waits for its trackers
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 300.0  # from one failed start to the next; it doubles

METRICS, SAMPLES, RESTART = "metrics", "samples", "restart"  # curves; an evaluation's is its metric's name


class Record(NamedTuple):
    """What a tracker is given of one step; RESTART: the run goes on from there."""

    curve: str
    step: int
    metrics: Mapping[str, float]  # of samples none: their texts are read from the run's folder


class Logged(msgspec.Struct):
    """What a tracker has been given; a file in the run's folder."""

    id: str
    steps: dict[str, int] = {}  # curve -> last step


class Tracking:
    """The trackers of one run, from RunStarted on. Its methods are called on the event loop."""

    def __init__(
        self,
        settings: Observe,
        folder: Path,
        recipe: Mapping[str, Any],
        exporter: Exporter,
    ) -> None:
        """`recipe`: the resolved one, as a table."""
        self._settings, self._folder, self._exporter = settings, folder, exporter
        self._recipe = {key: value for key, value in recipe.items() if key != "observe"}
        self._loop = asyncio.get_running_loop()
        self._following: asyncio.Task[None] | None = None
        self._threads: list[TrackerThread] = []

    def follow(self, events: AsyncIterator[tuple[int, Event]], warn: Callable[[str], None]) -> None:
        """Follow a run's events in a task. `warn` is called on the event loop, with the first failure of a tracker."""
        self._warn = warn
        if self._settings.trackers:
            self._following = asyncio.create_task(self._follow(events), name="trackers")

    async def _follow(self, events: AsyncIterator[tuple[int, Event]]) -> None:
        async for _, event in events:
            self.take(event)

    def take(self, event: Event) -> None:
        """Give an event to the trackers. Returns at once."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif record := record_of(event):
            for thread in self._threads:
                if not thread.offer(record):
                    self._exporter.inc("tracker_records_dropped_total", tracker=thread.name)

    def _start(self, event: RunStarted) -> None:
        for name in self._settings.trackers:
            path = self._folder / "trackers" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.json"
            logged = _read(path)
            run = TrackedRun(
                id=logged.id,
                name=event.run,
                folder=str(self._folder.absolute()),
                project=self._settings.project,
                first_step=event.first_step,
                recipe=self._recipe,
            )
            tracker = make_tracker(name, self._settings.options.get(name, {}))
            self._threads.append(TrackerThread(name, tracker, run, logged, path, self._failed))

    def _failed(self, name: str, error: BaseException) -> None:
        """Called in a tracker's thread."""
        text = f"tracker {name}: {type(error).__name__}: {error}; the run goes on without what it misses"
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._warn, text)

    async def close(self, seconds: float = CLOSE_SECONDS) -> list[str]:
        """Let the trackers finish, for so long at most. Returns what they lack, a line a tracker."""
        if self._following is not None:
            await asyncio.wait([self._following], timeout=seconds)
            self._following.cancel()
        for thread in self._threads:
            thread.close()
        end = time.monotonic() + seconds
        for thread in self._threads:
            await thread.ended(max(0.0, end - time.monotonic()))
        return [line for thread in self._threads if (line := thread.lacks())]


def record_of(event: Event) -> Record | None:
    """What an event means to a tracker; None: nothing."""
    match event:
        case StepCommitted():
            values = {name: value for name, value in line_of(event).items() if isinstance(value, int | float)}
            finite = {name.replace(".", "/", 1): float(v) for name, v in values.items() if math.isfinite(v)}
            finite.pop("step")
            return Record(METRICS, event.step, finite)
        case Evaluated() if math.isfinite(event.value):
            name = f"evaluation/{event.metric}"
            return Record(name, event.step, {name: event.value})
        case SamplesShown():
            return Record(SAMPLES, event.step, {})
        case RolledBack():
            return Record(RESTART, event.step, {})
        case _:
            return None


class TrackerThread:
    """One tracker at work. `offer` and `close` are called on the event loop, which they never hold up."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: TrackedRun,
        logged: Logged,
        path: Path,
        failed: Callable[[str, BaseException], None],
    ) -> None:
        """`path`: where `logged` is kept. `failed` is called in the thread, with the first failure only."""
        self.name = name
        self._tracker, self._run, self._logged, self._path, self._failed = tracker, run, logged, path, failed
        self._queue: queue.Queue[Record | None] = queue.Queue(QUEUE_RECORDS + 1)  # the last place is for the end
        self._closing = threading.Event()
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._dropped = self._refused = 0  # by the tracker, by the queue: one writer each
        self._reported = False
        # A daemon: a tracker that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def offer(self, record: Record) -> bool:
        """Queue a record. False: there was no room, and it is dropped."""
        if self._queue.qsize() >= QUEUE_RECORDS or self._closing.is_set():
            self._refused += 1
            return False
        self._queue.put_nowait(record)
        return True

    def close(self) -> None:
        """Let it end after what is queued."""
        if not self._closing.is_set():
            self._closing.set()
            self._queue.put_nowait(None)

    async def ended(self, seconds: float) -> None:
        """Wait for its end, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def lacks(self) -> str:
        """What the tracker was not given, in words; "" for nothing."""
        queued = sum(record is not None for record in list(self._queue.queue))
        dropped = self._dropped + self._refused + queued
        late = "" if self._ended.is_set() else f"; it had not ended after {CLOSE_SECONDS:g} s and is left behind"
        return f"tracker {self.name}: {dropped} records were dropped{late}" if dropped or late else ""

    # --- in the thread

    def _work(self) -> None:
        try:
            if self._started():
                while (record := self._queue.get()) is not None:
                    if record.curve != RESTART:
                        self._give(record)
                    elif not self._restarted(record.step):
                        break
            self._attempt(self._tracker.close)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._ended.set)

    def _restarted(self, step: int) -> bool:
        """Go on from an earlier step, as a resumed run does. False: as `_started`."""
        self._attempt(self._tracker.close)
        self._run = msgspec.structs.replace(self._run, first_step=step)
        return self._started()

    def _started(self) -> bool:
        """Start the tracker, again and again. False: the run has ended before that."""
        wait = RETRY_SECONDS
        while True:
            try:
                shown = self._tracker.start(self._run)
            except Exception as error:  # noqa: BLE001 - a tracker may fail in any way, and the run goes on
                self._report(error)
            else:
                if shown is not None:
                    self._logged.steps = {curve: min(step, shown) for curve, step in self._logged.steps.items()}
                return True
            if self._closing.wait(wait):
                return False
            wait = min(2 * wait, LONGEST_RETRY_SECONDS)

    def _give(self, record: Record) -> None:
        if record.step <= self._logged.steps.get(record.curve, -1):
            return  # it was logged before the run was resumed
        self._logged.steps[record.curve] = record.step
        # Before the tracker has it: a step that a crash loses here is better than one that is there twice.
        self._attempt(lambda: _write(self._path, self._logged))
        if not self._attempt(lambda: self._pass_on(record)):
            self._dropped += 1

    def _pass_on(self, record: Record) -> None:
        if record.curve != SAMPLES:
            return self._tracker.log(record.step, record.metrics)
        lines = whole_lines(Path(self._run.folder) / "samples.jsonl")
        found = (msgspec.json.decode(line, type=SampleLine) for line in reversed(lines))
        if (line := next((line for line in found if line.step == record.step), None)) is not None:
            self._tracker.texts(record.step, line.rows)
        return None

    def _attempt(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - as above
            self._report(error)
            return False
        return True

    def _report(self, error: BaseException) -> None:
        if not self._reported:
            self._reported = True
            self._failed(self.name, error)


def _read(path: Path) -> Logged:
    """What was logged; nothing where there is no file, or a damaged one: then the run is shown as a new one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Logged)
    except (OSError, msgspec.DecodeError):
        return Logged(secrets.token_hex(8))


def _write(path: Path, logged: Logged) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, msgspec.json.encode(logged))
