"""A run's events as server-sent events, read from the run's folder: as many readers as want, and none slows the run.

    events.jsonl ──Feed (one a run)──> frames of the newest events ──> each reader at its own pace
                 ──────────────────────────────────────────────────> a reader that is far behind reads the file itself

The frame of an event has the cursor after it as its id. Waits have no id, and only the last ones are sent. A comment is
sent where nothing happens, so that a dead connection is seen. The stream ends with a frame "end" when no process works
on the run and all events are sent. A run that was killed has no RunEnded: its readers get one that says so.

The feed looks at the file a few times a second instead of being told: so it works on every file system, for runs that
were started by hand, and costs the run nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from asyncflow.observe.event_file import Line, Recorded, end_of, line_before, read_events, read_waits
from protocols.control.errors import BadInput
from protocols.control.events import RunEnded
from protocols.control.problems import ServerError

LOOK_SECONDS = 0.1
ALIVE_SECONDS = 1.0  # how often it is checked that the run's process lives
HEARTBEAT_SECONDS = 10.0
RECENT_FRAMES = 1024

End = Callable[[], Awaitable[RunEnded | None]]  # how a run ended; None while a process works on it


class _Kind(msgspec.Struct):
    type: str


class _Head(msgspec.Struct):
    event: _Kind


class _Frame(NamedTuple):
    start: int
    end: int
    kind: str
    text: bytes


class Feed:
    """What all readers of one run share, while there are readers."""

    def __init__(self, folder: Path, end: End) -> None:
        self.folder, self._end = folder, end
        self.recent: deque[_Frame] = deque(maxlen=RECENT_FRAMES)
        self.end = end_of(folder)  # the cursor after the last event that the readers were shown
        self.waits = (0, b"")  # how many there were, and the frame of the last
        self.over: RunEnded | None = None
        self.changed = asyncio.Event()
        self.failed: Exception | None = None
        self.readers = 0

    async def run(self) -> None:
        """Watch the run until it is over."""
        checked = 0.0
        try:
            while self.over is None:
                over = None
                if time.monotonic() - checked >= ALIVE_SECONDS:
                    over, checked = await self._end(), time.monotonic()
                waits = await asyncio.to_thread(read_waits, self.folder)
                grew = await self._read()
                if waits and waits != self.waits[1]:
                    self.waits, grew = (self.waits[0] + 1, waits), True
                self.over = over  # it was over before the file was read: so all of it was read
                if grew or over is not None:
                    self._notify()
                if over is None:
                    await asyncio.sleep(LOOK_SECONDS)
        except (OSError, ValueError, ServerError, BadInput) as error:  # the folder is gone
            self.failed = error
            self._notify()

    async def _read(self) -> bool:
        grew = False
        while lines := await asyncio.to_thread(read_events, self.folder, self.end):
            for line in lines:
                self.recent.append(frame_of(self.end, line))
                self.end = line.cursor
            grew = True
        return grew

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Feeds:
    """The feeds of the runs that are being read."""

    def __init__(self) -> None:
        self._feeds: dict[Path, tuple[Feed, asyncio.Task[None]]] = {}

    @asynccontextmanager
    async def feed(self, folder: Path, end: End) -> AsyncGenerator[Feed]:
        """The feed of a run, which ends with its last reader."""
        if folder not in self._feeds or self._feeds[folder][1].done():
            made = Feed(folder, end)
            self._feeds[folder] = made, asyncio.create_task(made.run(), name=f"feed of {folder.name}")
        feed, task = self._feeds[folder]
        feed.readers += 1
        try:
            yield feed
        finally:
            feed.readers -= 1
            if not feed.readers:
                task.cancel()
                if self._feeds.get(folder, (None,))[0] is feed:
                    del self._feeds[folder]


async def frames(feeds: Feeds, folder: Path, cursor: int, end: End) -> AsyncGenerator[bytes]:
    """The frames of a run's events from a cursor on, which the caller has checked, until the run is over."""
    async with feeds.feed(folder, end) as feed:
        yield b": events\n\n"
        shown = 0
        ended = kind_of(await asyncio.to_thread(line_before, folder, cursor)) == "RunEnded"
        while feed.failed is None:
            changed = feed.changed
            while cursor < feed.end:
                if not (following := await _next(feed, cursor)):
                    break
                for frame in following:
                    cursor, ended = frame.end, frame.kind == "RunEnded"
                    yield frame.text
            number, waits = feed.waits
            if feed.over is not None:
                if not ended:
                    yield b"event: RunEnded\ndata: " + msgspec.json.encode(Recorded(time.time(), feed.over)) + b"\n\n"
                yield b"event: end\ndata: {}\n\n"
                return
            if number > shown:
                shown = number
                yield b"event: WaitsChanged\ndata: " + waits + b"\n\n"
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await changed.wait()
            except TimeoutError:
                yield b": nothing new\n\n"


async def _next(feed: Feed, cursor: int) -> list[_Frame]:
    """The next frames: the feed's own where it has them."""
    if feed.recent and feed.recent[0].start <= cursor:
        return [frame for frame in feed.recent if frame.start >= cursor]
    lines = await asyncio.to_thread(read_events, feed.folder, cursor)
    starts = [cursor, *(line.cursor for line in lines)]
    return [frame_of(start, line) for start, line in zip(starts, lines, strict=False)]


def frame_of(start: int, line: Line) -> _Frame:
    """The frame of a line of events.jsonl that begins at `start`."""
    kind = kind_of(line.text)
    return _Frame(
        start, line.cursor, kind, b"id: %d\nevent: %s\ndata: %s\n\n" % (line.cursor, kind.encode(), line.text)
    )


def kind_of(line: bytes) -> str:
    """The type of an event in a line of events.jsonl."""
    try:
        return msgspec.json.decode(line, type=_Head).event.type
    except msgspec.DecodeError:  # the reader sees that, and goes on
        return "unreadable"
