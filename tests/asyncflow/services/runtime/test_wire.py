"""The wire between two processes: every call gets its own answer, a lost connection is reported, and invalid bytes
end only the connection that sent them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import secrets
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop

from asyncflow.services.runtime.connection import MOST_BYTES, MOST_FRAMES, PROLOGUE, connect
from asyncflow.services.runtime.shared import SharedFrame, holdings
from asyncflow.services.runtime.wire import (
    Call,
    Cancelled,
    ConnectionLost,
    NotListening,
    Server,
    Wire,
    Work,
    travels,
)

PATIENCE_SECONDS = 60.0


class Gated:
    """Work whose answers wait until `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, what: str, body: bytes, payloads: list[Any]) -> tuple[bytes, list[Any]]:
        await self.go.wait()
        return body, [object()]


async def answer(what: str, body: bytes, payloads: list[Any]) -> tuple[bytes, list[Any]]:
    match what:
        case "echo":
            return body, payloads
        case "wait":
            await asyncio.sleep(3600)
        case "reference":
            return body, [object()]
    raise ValueError(f"no {what} here")


def serve(name: str, ready: Any) -> None:
    """Run in another process: serve until killed."""

    async def run() -> None:
        await Server(name, answer).start()
        ready.set()
        await asyncio.Event().wait()

    uvloop.run(run())


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[str, int]]:
    """Name and process id of a server in its own process, for tests that do not kill it."""
    with running() as (name, pid):
        yield name, pid


class running:
    """A server in its own process."""

    def __enter__(self) -> tuple[str, int]:
        spawn = multiprocessing.get_context("spawn")
        name, ready = named(), spawn.Event()
        self._process = spawn.Process(target=serve, args=(name, ready), daemon=True)
        self._process.start()
        assert ready.wait(PATIENCE_SECONDS)
        assert self._process.pid is not None
        return name, self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def named() -> str:
    return f"test-{secrets.token_hex(8)}"


@asynccontextmanager
async def wired(name: str) -> AsyncIterator[Wire]:
    to = Wire(name)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield to
    finally:
        to.close()


@asynccontextmanager
async def served(name: str, work: Work = answer) -> AsyncIterator[Server]:
    """A server in this process."""
    server = Server(name, work)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def listening(name: str) -> bool:
    return f"@asyncflow/{name}" in Path("/proc/net/unix").read_text()


# --- calls


async def test_a_call_comes_back_with_what_was_asked(other: tuple[str, int]):
    async with wired(other[0]) as to:
        back = await to.call("echo", b"body", [b"one", b"", b"x" * 3_000_000])
    assert (back.body, back.payloads, back.error, back.kept) == (b"body", [b"one", b"", b"x" * 3_000_000], None, 0)


async def test_frames_in_shared_memory_travel_with_a_call_and_with_its_answer(other: tuple[str, int]):
    frames = [SharedFrame.of(np.full(3_000_000, number, np.uint8)) for number in (1, 2)]
    async with wired(other[0]) as to:
        back = await to.call("echo", b"body", [frames[0], b"between", frames[1]])
    assert back.payloads[1] == b"between"
    for sent, came in zip(frames, back.payloads[::2], strict=True):
        assert isinstance(came, SharedFrame)
        assert (came.map() == sent.map()).all()


async def test_no_frame_is_held_once_its_call_is_over():
    """Neither the waiting connection nor the completed call may hold a reference to a frame."""

    async def take(what: str, body: bytes, payloads: list[Any]) -> tuple[bytes, list[Any]]:
        return b"", [SharedFrame.of(payloads[0].map())]

    before, name = holdings().frames, named()
    async with served(name, take), wired(name) as to:
        for _ in range(3):
            back = await to.call("", b"", [SharedFrame.of(np.ones(100_000, np.uint8))])
            assert list(map(type, back.payloads)) == [SharedFrame]
            del back
            await asyncio.sleep(0)  # the server's task ends after it has sent the answer
        assert holdings().frames == before


async def test_many_calls_at_once_each_get_their_own_answer(other: tuple[str, int]):
    async with wired(other[0]) as to:
        answers = await asyncio.gather(*(to.call("echo", str(n).encode(), [b"p" * n]) for n in range(500)))
    assert [a.body for a in answers] == [str(n).encode() for n in range(500)]
    assert [a.payloads for a in answers] == [[b"p" * n] for n in range(500)]


async def test_a_call_that_waits_holds_up_no_other(other: tuple[str, int]):
    async with wired(other[0]) as to:
        waiting = [asyncio.create_task(to.call("wait", b"")) for _ in range(20)]
        assert (await to.call("echo", b"meanwhile")).body == b"meanwhile"
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (await to.call("echo", b"after")).body == b"after", "a caller that gives up leaves the others"


async def test_what_the_work_raises_is_the_callers(other: tuple[str, int]):
    async with wired(other[0]) as to:
        assert (await to.call("nothing", b"")).error == "ValueError: no nothing here"


async def test_an_error_that_is_no_text_is_told_all_the_same():
    async def fail(what: str, body: bytes, payloads: list[Any]) -> tuple[bytes, list[Any]]:
        raise ValueError("caf\udce9")

    name = named()
    async with served(name, fail), wired(name) as to:
        assert (await to.call("", b"")).error == "ValueError: caf\\udce9"


async def test_an_answer_that_is_too_long_to_travel_is_the_callers_error_and_ends_no_connection():
    async def long(what: str, body: bytes, payloads: list[Any]) -> tuple[bytes, list[Any]]:
        return bytes(MOST_BYTES // 2 if what == "long" else 1), []

    name = named()
    async with served(name, long), wired(name) as to:
        assert f"an answer of {MOST_BYTES // 2} bytes" in ((await to.call("long", b"")).error or "")
        assert (await to.call("short", b"")).body == b"\0"


async def test_an_answer_that_is_not_bytes_is_kept_and_collected_once():
    name = named()
    async with served(name) as server, wired(name) as to:
        back = await to.call("reference", b"body")
        assert (back.body, back.payloads) == (b"body", [])
        assert [type(payload) for payload in server.collect(back.kept)] == [object]
        with pytest.raises(KeyError):
            server.collect(back.kept)


async def test_nothing_is_kept_for_a_caller_that_gave_up():
    name, work = named(), Gated()
    async with served(name, work) as server, wired(name) as to:
        waiting = asyncio.create_task(to.call("", b""))
        while not server._calls:
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        work.go.set()
        last = await to.call("", b"")
        assert list(server._kept) == [last.kept], "what came before it was let go"


async def test_nothing_is_kept_for_a_caller_that_gave_up_as_its_answer_came():
    name = named()
    async with served(name) as server, wired(name) as to:
        waiting = asyncio.create_task(to.call("reference", b""))
        while not any(future.done() for future in to._waiting.values()):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await to.call("echo", b"")
        assert not server._kept


async def test_nothing_is_kept_for_a_caller_that_is_gone():
    name, work = named(), Gated()
    work.go.set()
    async with served(name, work) as server:
        async with wired(name) as to:
            await to.call("", b"")
            assert len(server._kept) == 1
            work.go.clear()
            later = asyncio.create_task(to.call("", b""))
            while not server._calls:
                await asyncio.sleep(0.001)
        await asyncio.gather(later, *server._connections, return_exceptions=True)
        assert not server._kept, "what it had not collected"
        work.go.set()
        await asyncio.gather(*server._calls)
        assert not server._kept, "what was done after it had gone"


def test_bytes_and_frames_travel_and_not_too_many():
    frame = SharedFrame.of(np.ones(MOST_BYTES, np.uint8))
    assert travels([])
    assert travels([b"a", frame, b"b"])
    assert travels([frame] * MOST_FRAMES)
    assert not travels([frame] * (MOST_FRAMES + 1))
    assert not travels([b"a", ["reference"]])
    assert not travels([bytes(MOST_BYTES // 2)])
    assert not travels([], bytes(MOST_BYTES // 2))


# --- lost connections


async def test_nobody_listens_under_an_unknown_name():
    async with wired(named()) as to:
        with pytest.raises(NotListening):
            await to.call("echo", b"")


async def test_calls_to_a_process_that_is_killed_are_broken_and_then_nobody_is_there():
    with running() as (name, pid):
        async with wired(name) as to:
            waiting = [asyncio.create_task(to.call("wait", b"")) for _ in range(3)]
            await to.call("echo", b"")
            os.kill(pid, signal.SIGKILL)
            for task in waiting:
                with pytest.raises(ConnectionLost, match=name):
                    await task
            with pytest.raises((NotListening, ConnectionLost)):
                await to.call("echo", b"")
            assert not listening(name)


async def test_a_connection_that_ended_is_made_anew():
    name = named()
    async with wired(name) as to:
        for _ in range(2):
            async with served(name):
                assert (await to.call("echo", b"here")).body == b"here"
            assert to._listening is not None
            await to._listening
        assert not listening(name)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(struct.pack("<II", MOST_BYTES + 1, 0), id="too long"),
        pytest.param(struct.pack("<II", 4, 0) + b"\xc1\xc1\xc1\xc1", id="no msgpack"),
        pytest.param(struct.pack("<II", 1, 0) + msgspec.msgpack.encode(7), id="no call"),
        pytest.param(struct.pack("<II", 6, 0) + msgspec.msgpack.encode(Call(1, "", b"", [None])), id="no frame"),
        pytest.param(struct.pack("<II", 100, 0) + b"cut", id="cut short"),
    ],
)
async def test_garbage_ends_the_connection_that_sent_it_and_no_other(sent: bytes):
    name = named()
    async with served(name) as server, wired(name) as to:
        await to.call("echo", b"")
        reader, writer = await asyncio.open_unix_connection(f"\0asyncflow/{name}")
        writer.write(sent)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert (await to.call("echo", b"still")).body == b"still"
        assert len(server._connections) == 1


async def test_an_answer_that_is_garbage_breaks_the_calls_that_wait():
    name = named()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0asyncflow/{name}")

        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(4)
            writer.write(struct.pack("<II", 3, 0) + b"\xc1\xc1\xc1")

        async with await asyncio.start_unix_server(babble, sock=listener), wired(name) as to:
            with pytest.raises(ConnectionLost):
                await to.call("echo", b"")


async def test_another_user_is_refused_on_either_side(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    name = named()
    async with served(name), wired(name) as to:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(NotListening, match="as user"):
            await to.call("echo", b"")
        reader, writer = await asyncio.open_unix_connection(f"\0asyncflow/{name}")
        assert await reader.read() == b""
        writer.close()
    assert "this process as 12345" in capfd.readouterr().err


@pytest.mark.parametrize("message", [b"\xc1", b"\x95\x00\x01\xa1\xff\xc4\x00\x90"], ids=["no message", "no UTF-8"])
async def test_a_message_that_can_not_be_read_closes_its_connection_only(
    message: bytes, capfd: pytest.CaptureFixture[str]
):
    name = named()
    async with served(name), wired(name) as to:
        broken = await connect(name)
        broken.send(bytearray(PROLOGUE) + message)
        assert await broken.receive() is None
        broken.close()
        assert await to.call("echo", b"more") is not None
    assert "a connection is closed" in capfd.readouterr().err


async def test_a_server_that_closed_leaves_nothing():
    name = named()
    async with served(name) as server, wired(name) as to:
        waiting = asyncio.create_task(to.call("wait", b""))
        await to.call("echo", b"")
        await server.close()
        with pytest.raises(ConnectionLost):
            await waiting
        assert not server._connections
        assert not server._calls
        assert not to._waiting
        assert not listening(name)


def test_a_call_is_an_array_of_numbered_parts():
    """Both ends run the same release, so fields are identified by their position."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Call(1, "deliver", b"b", [b"p"]))) == [
        0,
        1,
        "deliver",
        b"b",
        [b"p"],
    ]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Cancelled(7))) == [1, 7]
