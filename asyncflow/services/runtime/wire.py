"""The short way between two processes of one node: a socket beside Ray's calls, for what is bytes and nothing else.

    caller ── Call(number, what, body, payloads) ──> a task a call ── Answer(number, body, payloads) ──> the caller

Each message stands behind its length. A call waits for its own answer and for no other's, so one that waits for
credit holds up none. Sockets have abstract names: they need no file, vanish with their process, and can't be reached
from another node. Both ends refuse a peer of another user. An answer that is not all bytes, because a rank put a large
frame, is kept where it was made until whoever can carry references has fetched it, the caller gives up, or is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import uvloop

from asyncflow.services.endpoint import causes

AVAILABLE = sys.platform == "linux"  # no other system has abstract names, and tells the user behind a socket this way
MOST_BYTES = 64 << 20  # of a message; a longer one is garbage
MOST_CALLS = 1000  # of one connection that wait for their answers
_LENGTH = struct.Struct("<I")
_USER = struct.Struct("3i")  # pid, uid, gid of the process behind a socket
_READ_AHEAD = 1 << 20

Work = Callable[[str, bytes, list[bytes]], Awaitable[tuple[bytes, list[Any]]]]  # (what, body, payloads) -> the same


class Call(msgspec.Struct, array_like=True, tag=0):
    """What is asked."""

    number: int
    what: str
    body: bytes
    payloads: list[bytes]


class GivenUp(msgspec.Struct, array_like=True, tag=1):
    """Nobody will collect what was kept under this number."""

    kept: int


class Answer(msgspec.Struct, array_like=True):
    """What came of the call of that number."""

    number: int
    body: bytes = b""
    payloads: list[bytes] = []
    error: str | None = None  # why it was not done
    kept: int = 0  # under which number `Server.collect` gives the payloads, where they are not bytes


_calls = msgspec.msgpack.Decoder(Call | GivenUp)
_answers = msgspec.msgpack.Decoder(Answer)
_encoder = msgspec.msgpack.Encoder()


class NotHere(Exception):
    """Nobody listens under that name on this node."""


class Broken(Exception):
    """The connection ended before the answer came: whether the call was done is not known."""


class Garbage(Exception):
    """What came is no message of ours, or not from us."""


class Server:
    """Answers calls of other processes, each in a task of its own."""

    def __init__(self, name: str, work: Work) -> None:
        """`work` does what is asked; what it raises is the caller's."""
        self._name, self._work = name, work
        self._listening: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._kept: dict[int, tuple[asyncio.StreamWriter, list[Any]]] = {}
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Listen. Raises OSError where the name is taken."""
        listener = _socket()
        listener.bind(_address(self._name))
        self._listening = await asyncio.start_unix_server(self._serve, sock=listener, limit=_READ_AHEAD)

    def collect(self, kept: int) -> list[Any]:
        """The payloads of an answer that was kept. Raises KeyError where they were collected, or given up."""
        return self._kept.pop(kept)[1]

    async def close(self) -> None:
        """Listen no longer, and end the connections and what is under way."""
        if self._listening is not None:
            self._listening.close()
        for tasks in (self._connections, self._calls):  # in this order: a connection would begin further calls
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        room = asyncio.Semaphore(MOST_CALLS)
        try:
            _check_user(writer.get_extra_info("socket"))
            while (packed := await _receive(reader)) is not None:
                match _calls.decode(packed):
                    case GivenUp(kept):
                        self._kept.pop(kept, None)
                    case Call() as call:
                        await room.acquire()
                        self._begin(call, writer, room)
        except (Garbage, msgspec.MsgspecError, OSError) as error:
            sys.stderr.write(f"{self._name}: a connection is closed: {error}\n")
        except asyncio.CancelledError:
            pass  # `close`; asyncio's streams would report a handler that ends by it as a fault
        finally:
            writer.close()  # calls under way are done all the same, as Ray's are
            for number in [number for number, (caller, _) in list(self._kept.items()) if caller is writer]:
                self._kept.pop(number, None)
            self._connections.discard(connection)

    def _begin(self, call: Call, writer: asyncio.StreamWriter, room: asyncio.Semaphore) -> None:
        def done(task: asyncio.Task[None]) -> None:
            self._calls.discard(task)
            room.release()

        task = asyncio.create_task(self._answer(call, writer), name=f"{call.what} over the wire")
        self._calls.add(task)
        task.add_done_callback(done)

    async def _answer(self, call: Call, writer: asyncio.StreamWriter) -> None:
        answer, payloads = Answer(call.number), []
        try:
            answer.body, payloads = await self._work(call.what, call.body, call.payloads)
            _check_size(answer.body)
        except Exception as error:  # noqa: BLE001 - it is not swallowed: the caller gets it, this process's log the rest
            traceback.print_exc()
            answer.body, answer.error, payloads = b"", causes(error), []
        if writer.is_closing():  # nobody waits
            return
        if travels(payloads, answer.body):
            answer.payloads = payloads
        else:
            answer.kept = next(self._numbers)
            self._kept[answer.kept] = writer, payloads
        _send(writer, answer)
        with contextlib.suppress(OSError):  # the caller is gone
            await writer.drain()


class ServerThread:
    """A server with an event loop of its own, for a process that has none."""

    def __init__(self, name: str, work: Work) -> None:
        self._server = Server(name, work)
        self.collect = self._server.collect
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name} wire", daemon=True)

    def start(self) -> None:
        """See `Server.start`."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result()

    def close(self) -> None:
        """See `Server.close`; then end the thread. Nothing where it was not started."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Wire:
    """The way to one server, for the calls of one event loop; connects when first used."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._connecting = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count()

    async def call(self, what: str, body: bytes, payloads: Sequence[bytes] = ()) -> Answer:
        """Ask, and wait for the answer. Raises NotHere where nothing was sent, Broken where nothing came back."""
        if self._writer is None:
            await self._connect()
        writer = self._writer
        if writer is None or writer.is_closing():
            raise NotHere(f"{self.name}: the connection is about to end")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            _send(writer, Call(number, what, body, list(payloads)))
            with contextlib.suppress(OSError):  # the listener learns of it, too, and breaks what waits
                await writer.drain()
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._let_go(answer.result())
            raise
        finally:
            del self._waiting[number]

    def close(self) -> None:
        """End the connection; calls that wait for answers raise Broken."""
        if self._writer is not None:
            self._writer.transport.abort()

    def _let_go(self, answer: Answer) -> None:
        """Nobody waits for it any more."""
        if answer.kept and self._writer is not None and not self._writer.is_closing():
            _send(self._writer, GivenUp(answer.kept))

    async def _connect(self) -> None:
        async with self._connecting:
            if self._writer is not None:
                return
            calling = _socket()
            try:
                await asyncio.get_running_loop().sock_connect(calling, _address(self.name))
                _check_user(calling)
                reader, writer = await asyncio.open_unix_connection(sock=calling, limit=_READ_AHEAD)
            except (OSError, Garbage) as error:
                calling.close()
                raise NotHere(f"{self.name}: {error}") from error
            self._writer = writer
            self._listening = asyncio.create_task(self._listen(reader, writer), name=f"answers of {self.name}")

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (packed := await _receive(reader)) is not None:
                answer = _answers.decode(packed)
                future = self._waiting.get(answer.number)
                if future is None or future.done():
                    self._let_go(answer)
                else:
                    future.set_result(answer)
        except (Garbage, msgspec.MsgspecError, OSError) as error:
            sys.stderr.write(f"{self.name}: the connection is closed: {error}\n")
        finally:
            self._writer = None  # whoever calls next connects anew, if anybody is there
            writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Broken(f"{self.name}: the connection ended"))


def travels(payloads: Sequence[Any], body: bytes = b"") -> bool:
    """Whether a message can hold them all: they are bytes, and not too many."""
    return all(isinstance(p, bytes) for p in payloads) and len(body) + sum(map(len, payloads)) < MOST_BYTES // 2


def _check_size(body: bytes) -> None:
    if not travels([], body):
        raise ValueError(f"an answer of {len(body)} bytes beside its payloads, fewer than {MOST_BYTES // 2} can travel")


def _send(writer: asyncio.StreamWriter, message: Call | GivenUp | Answer) -> None:
    packed = bytearray(_LENGTH.size)
    _encoder.encode_into(message, packed, _LENGTH.size)
    _LENGTH.pack_into(packed, 0, len(packed) - _LENGTH.size)
    writer.write(packed)


async def _receive(reader: asyncio.StreamReader) -> bytes | None:
    """One message; None where the connection ends. Raises Garbage."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MOST_BYTES:
            raise Garbage(f"a message of {length} bytes, at most {MOST_BYTES} are accepted")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        return None


def _socket() -> socket.socket:
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    opened.setblocking(False)
    return opened


def _address(name: str) -> str:
    return f"\0asyncflow/{name}"


def _check_user(connected: socket.socket) -> None:
    peer = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _USER.size)
    _, user, _ = _USER.unpack(peer)
    if user != os.getuid():
        raise Garbage(f"the other end runs as user {user}, this process as {os.getuid()}")
