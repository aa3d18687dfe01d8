"""A connection delivers messages with their frames, whole and in order, slows a fast sender down, and leaks nothing."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.runtime.connection import MOST_BYTES, MOST_FRAMES, PROLOGUE, Connection, Garbage
from asyncflow.services.runtime.shared import SharedFrame

PATIENCE_SECONDS = 60.0


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Connection, Connection]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    here, there = map(Connection, ends)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield here, there
    finally:
        here.close()
        there.close()


@asynccontextmanager
async def half_connected() -> AsyncIterator[tuple[socket.socket, Connection]]:
    """A raw socket for the test to write to, and the connection that reads from it."""
    raw, end = socket.socketpair()
    end.setblocking(False)
    there = Connection(end)
    try:
        with raw:
            async with asyncio.timeout(PATIENCE_SECONDS):
                yield raw, there
    finally:
        there.close()


def message(body: bytes) -> bytearray:
    return bytearray(PROLOGUE) + body


def frame(number: int) -> SharedFrame:
    return SharedFrame.of(np.frombuffer(struct.pack("<I", number) * 3, np.uint8))


def number_of(shared: SharedFrame) -> int:
    return struct.unpack_from("<I", shared.map().data)[0]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_message_arrives_with_its_frames():
    async with connected() as (here, there):
        here.send(message(b"two"), [frame(1), frame(2)])
        here.send(message(b""))
        here.send(message(b"one"), [frame(3)])
        got = [await there.receive() for _ in range(3)]
    assert [(m[0], [number_of(f) for f in m[1]]) for m in got if m] == [(b"two", [1, 2]), (b"", []), (b"one", [3])]


@given(st.lists(st.tuples(st.sampled_from([0, 1, 300, 70_000, 600_000]), st.integers(0, 3)), max_size=12))
def test_whatever_is_sent_arrives_whole_and_in_order(sent: list[tuple[int, int]]):
    """Messages larger than the socket's buffer, so that bytes and descriptors leave in pieces."""

    async def run() -> None:
        async with connected() as (here, there):
            expected = []
            for number, (length, frames) in enumerate(sent):
                body = bytes([number]) * length
                numbers = [10 * number + i for i in range(frames)]
                here.send(message(body), [frame(n) for n in numbers])
                expected.append((body, numbers))
            got = [await there.receive() for _ in sent]
            assert [(m[0], [number_of(f) for f in m[1]]) for m in got if m] == expected

    asyncio.run(run())


async def test_more_frames_than_the_kernel_takes_at_once():
    async with connected() as (here, there):
        shared = frame(7)
        here.send(message(b"x" * 100_000), [shared] * 700)
        received = await there.receive()
        assert received is not None
        assert (len(received[0]), len(received[1])) == (100_000, 700)
        assert {number_of(f) for f in received[1]} == {7}


async def test_who_sends_more_than_is_read_waits_and_the_reader_holds_a_bounded_amount():
    async with connected() as (here, there):
        sent = 0
        while True:
            here.send(message(bytes(100_000)))
            sent += 1
            try:
                async with asyncio.timeout(0.5):
                    await here.drain()
            except TimeoutError:
                break
        assert sent < 50, "the reader went on although nobody asked it to"
        assert len(there._read) < 4 << 20
        for _ in range(sent):
            received = await there.receive()
            assert received is not None
            assert len(received[0]) == 100_000
        await here.drain()


async def test_the_end_is_told_after_all_that_came_before_it():
    async with connected() as (here, there):
        here.send(message(b"last"), [frame(1)])
        here.close()
        received = await there.receive()
        assert received is not None
        assert received[0] == b"last"
        assert await there.receive() is None
        assert await there.receive() is None


async def test_a_reader_that_waits_learns_that_its_own_end_was_closed():
    async with connected() as (_, there):
        waiting = asyncio.create_task(there.receive())
        await asyncio.sleep(0)
        there.close()
        assert await waiting is None
        there.send(message(b"dropped"))
        await there.drain()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        pytest.param(struct.pack("<II", MOST_BYTES + 1, 0), "a message of", id="too long"),
        pytest.param(struct.pack("<II", 1, MOST_FRAMES + 1), "frames, at most", id="too many frames"),
        pytest.param(struct.pack("<II", 1, 2) + b"x", "came with 0 frames of 2", id="frames that did not come"),
        pytest.param(struct.pack("<II", 9, 0) + b"cut", "in the middle of a message", id="cut short"),
    ],
)
async def test_garbage_is_told(sent: bytes, said: str):
    async with half_connected() as (raw, there):
        raw.send(sent)
        raw.shutdown(socket.SHUT_WR)
        with pytest.raises(Garbage, match=said):
            await there.receive()


async def test_a_descriptor_that_is_no_frame_is_garbage():
    async with half_connected() as (raw, there):
        with Path("/dev/null").open() as other:
            rights = array.array("i", [other.fileno()])
            raw.sendmsg([struct.pack("<II", 1, 1) + b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        with pytest.raises(Garbage, match="no shared frame"):
            await there.receive()


async def test_frames_that_nobody_took_are_closed_with_the_connection():
    before = open_files()
    async with connected() as (here, there):
        for number in range(5):
            here.send(message(b"x"), [frame(number)])
        here.send(message(bytes(1 << 20)), [frame(5)])  # and one that is still in flight
        await there.receive()
    assert open_files() == before


async def test_a_process_without_descriptors_left_says_so(monkeypatch: pytest.MonkeyPatch):
    async with connected() as (here, there):
        monkeypatch.setattr(there, "_room_for_descriptors", socket.CMSG_SPACE(4))
        here.send(message(b"x"), [frame(1), frame(2), frame(3)])
        with pytest.raises(Garbage, match="limit of open files"):
            await there.receive()


class Refusing:
    """A socket that fails to send with `error` the first `times` times."""

    def __init__(self, real: socket.socket, error: int, times: int) -> None:
        self._real, self._error, self.times = real, error, times

    def sendmsg(self, *arguments: Any) -> int:
        if self.times:
            self.times -= 1
            raise OSError(self._error, os.strerror(self._error))
        return self._real.sendmsg(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def test_a_message_waits_while_too_many_descriptors_are_in_flight(monkeypatch: pytest.MonkeyPatch):
    async with connected() as (here, there):
        refusing = Refusing(here._socket, errno.ETOOMANYREFS, 3)
        monkeypatch.setattr(here, "_socket", refusing)
        for number in (1, 2):
            here.send(message(b"late"), [frame(number)])
        got = [await there.receive() for _ in range(2)]
        assert [(m[0], [number_of(f) for f in m[1]]) for m in got if m] == [(b"late", [1]), (b"late", [2])]
        assert not refusing.times
        monkeypatch.undo()


async def test_it_retries_at_intervals_while_too_many_descriptors_are_in_flight(monkeypatch: pytest.MonkeyPatch):
    """Also if the socket was full before: that it is writable again must not cause a busy loop."""
    async with connected() as (here, there):
        here.send(message(bytes(2_000_000)), [frame(1)])  # more than the socket takes
        here.send(message(b"late"), [frame(2)])
        refusing = Refusing(here._socket, errno.ETOOMANYREFS, 10**9)
        monkeypatch.setattr(here, "_socket", refusing)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await there.receive()
        assert 0 < 10**9 - refusing.times < 60
        refusing.times = 0
        got = [await there.receive() for _ in range(2)]
        assert [number_of(m[1][0]) for m in got if m] == [1, 2]
        monkeypatch.undo()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_peer_that_dies_with_something_unread_ends_the_connection(loop: Callable[[], asyncio.AbstractEventLoop]):
    """What it sent before comes first. uvloop abandons a socket with an error after one more read."""

    async def run() -> None:
        async with half_connected() as (raw, there):
            there.send(message(b"never read"))
            raw.send(struct.pack("<II", 4, 0) + b"last" + struct.pack("<II", 400_000, 0))
            raw.send(bytes(100_000))
            raw.close()  # with an unread message in its queue: the other end gets an error, not an end of file
            received = await there.receive()
            assert received is not None
            assert received[0] == b"last"
            with pytest.raises((Garbage, OSError)):
                await there.receive()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


async def test_what_can_not_be_sent_ends_the_connection_with_its_cause(monkeypatch: pytest.MonkeyPatch):
    """Otherwise the caller would wait for an answer forever."""
    async with connected() as (here, _):
        monkeypatch.setattr(here, "_socket", Refusing(here._socket, errno.ENOBUFS, 1))
        here.send(message(bytes(100_000)), [frame(1)])
        await here.drain()
        with pytest.raises(OSError, match=os.strerror(errno.ENOBUFS)):
            await here.receive()
        monkeypatch.undo()
