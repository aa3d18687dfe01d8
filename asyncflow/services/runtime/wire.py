"""Wire: calls between two processes of one node over a Unix socket, with frames in shared memory.

    caller ── Call(number, what, body, payloads) ──> one task per call ── Answer(number, body, payloads) ──> caller

It replaces Ray's actor calls and object store where both ends are on one node: there a Ray call costs a task submission
and a round through the driver's event loop, and a stored frame a copy and distributed reference counts. `asyncflow
bench channels` measures both. Ray still starts the processes, carries object references, and connects the nodes.

A payload is bytes, or a frame in shared memory that travels beside the message. Calls do not wait for each other. A
socket has an abstract name: it needs no file, vanishes with its process, and can't be reached from another node or by
another user. An answer with a reference (a frame in Ray's store) can't travel: it is kept for `collect` through Ray,
until the caller gives up or is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from asyncflow.services.channels.endpoint import causes
from asyncflow.services.runtime import shared
from asyncflow.services.runtime.connection import (
    MOST_BYTES,
    MOST_FRAMES,
    PROLOGUE,
    Connection,
    Garbage,
    connect,
    listen,
)
from asyncflow.services.runtime.shared import SharedFrame

AVAILABLE = shared.AVAILABLE  # other systems lack abstract socket names and SO_PEERCRED
MOST_CALLS = 1000  # of one connection that are being answered
ACCEPT_AGAIN_SECONDS = 1.0  # after a connection could not be accepted, for lack of descriptors

Carried = bytes | SharedFrame
Work = Callable[[str, bytes, list[Carried]], Awaitable[tuple[bytes, list[Any]]]]  # (what, body, payloads) -> the same


class Call(msgspec.Struct, array_like=True, tag=0):
    """A call of a server's method."""

    number: int
    what: str
    body: bytes
    payloads: list[bytes | None]  # None: the next of the frames that travel beside the message


class Cancelled(msgspec.Struct, array_like=True, tag=1):
    """Nobody will collect the answer that was kept under this number."""

    kept: int


class Answer(msgspec.Struct, array_like=True):
    """The answer to the call of that number."""

    number: int
    body: bytes = b""
    payloads: list[bytes | None] = []
    error: str | None = None  # why the call failed
    kept: int = 0  # the number for `Server.collect`, if the payloads can't travel


_calls = msgspec.msgpack.Decoder(Call | Cancelled)
_answers = msgspec.msgpack.Decoder(Answer)
_encoder = msgspec.msgpack.Encoder()


class NotListening(Exception):
    """No process listens under that name on this node."""


class ConnectionLost(Exception):
    """The connection ended before the answer arrived. The call may have been carried out."""


class Server:
    """Answers the calls of other processes, each in a task of its own."""

    def __init__(self, name: str, work: Work) -> None:
        """`work` carries out a call; its exceptions go to the caller."""
        self._name, self._work = name, work
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._kept: dict[int, tuple[Connection, list[Any]]] = {}
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Listen. Raises OSError if the name is taken."""
        listener = listen(self._name, MOST_CALLS)
        self._accepting = asyncio.create_task(self._accept(listener), name=f"{self._name} listens")

    def collect(self, kept: int) -> list[Any]:
        """The payloads of an answer that was kept. Raises KeyError if they were collected or cancelled."""
        return self._kept.pop(kept)[1]

    async def close(self) -> None:
        """Stop listening, close the connections and cancel the calls under way."""
        # In this order: the listener starts connections, and a connection starts calls.
        for tasks in ([self._accepting] if self._accepting else [], self._connections, self._calls):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
                    connection = Connection(accepted)
                except Garbage as error:
                    sys.stderr.write(f"{self._name}: a connection is refused: {error}\n")
                except OSError as error:
                    sys.stderr.write(f"{self._name}: accepts no connection: {error}\n")
                    await asyncio.sleep(ACCEPT_AGAIN_SECONDS)
                else:
                    task = asyncio.create_task(self._serve(connection), name=f"{self._name} serves")
                    self._connections.add(task)
                    task.add_done_callback(self._connections.discard)
                    task.add_done_callback(lambda _, ended=connection: ended.close())  # also if the task never ran

    async def _serve(self, connection: Connection) -> None:
        room = asyncio.Semaphore(MOST_CALLS)
        try:
            while await self._take(connection, room):
                pass  # `_take` has returned, so the last message's frames are not held until the next one arrives
        except (Garbage, msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            sys.stderr.write(f"{self._name}: a connection is closed: {error}\n")
        finally:
            connection.close()  # calls under way are finished all the same, as Ray's are
            for number in [number for number, (caller, _) in list(self._kept.items()) if caller is connection]:
                self._kept.pop(number, None)

    async def _take(self, connection: Connection, room: asyncio.Semaphore) -> bool:
        """Receive a message and start its call. Returns whether there was one."""
        if (received := await connection.receive()) is None:
            return False
        packed, frames = received
        match _calls.decode(packed):
            case Cancelled(kept):
                self._kept.pop(kept, None)
            case Call() as call:
                payloads = _join_payloads(call.payloads, frames)
                await room.acquire()
                task = asyncio.create_task(self._answer(call, payloads, connection), name=f"{call.what} over the wire")
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
                task.add_done_callback(lambda _: room.release())
        return True

    async def _answer(self, call: Call, payloads: list[Carried], connection: Connection) -> None:
        answer, answers = Answer(call.number), []
        try:
            answer.body, answers = await self._work(call.what, call.body, payloads)
            if not travels([], answer.body):
                raise ValueError(
                    f"an answer of {len(answer.body)} bytes beside its payloads; the limit is {MOST_BYTES // 2}"
                )
        except Exception as error:  # noqa: BLE001 - not swallowed: the caller gets it, this process's log the traceback
            traceback.print_exc()
            # A file name in the text may not be valid Unicode, which a message can't hold.
            answer.body, answer.error, answers = b"", causes(error).encode(errors="backslashreplace").decode(), []
        if connection.closed:  # the caller is gone
            return
        frames: list[SharedFrame] = []
        if travels(answers, answer.body):
            answer.payloads, frames = _split_payloads(answers)
        else:
            answer.kept = next(self._numbers)
            self._kept[answer.kept] = connection, answers
        _send(connection, answer, frames)
        await connection.drain()


class Wire:
    """A client of one server, for the calls of one event loop. It connects at the first call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._connecting = asyncio.Lock()
        self._connection: Connection | None = None
        self._listening: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Answered]] = {}
        self._numbers = itertools.count()

    async def call(self, what: str, body: bytes, payloads: Sequence[Carried] = ()) -> Answered:
        """Call, and wait for the answer. Raises NotListening if nothing was sent, ConnectionLost if no answer came."""
        if self._connection is None:
            await self._connect()
        connection = self._connection
        if connection is None or connection.closed:
            raise NotListening(f"{self.name}: the connection is about to end")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            packed, frames = _split_payloads(payloads)
            _send(connection, Call(number, what, body, packed), frames)
            await connection.drain()
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._cancel(answer.result().kept)
            raise
        finally:
            del self._waiting[number]

    def close(self) -> None:
        """Close the connection; calls that wait for an answer raise ConnectionLost."""
        if self._connection is not None:
            self._connection.close()

    def _cancel(self, kept: int) -> None:
        """Let the server drop an answer that nobody waits for any more."""
        if kept and self._connection is not None:
            _send(self._connection, Cancelled(kept))

    async def _connect(self) -> None:
        async with self._connecting:
            if self._connection is not None:
                return
            try:
                connection = await connect(self.name)
            except (OSError, Garbage) as error:
                raise NotListening(f"{self.name}: {error}") from error
            self._connection = connection
            self._listening = asyncio.create_task(self._listen(connection), name=f"answers of {self.name}")

    async def _listen(self, connection: Connection) -> None:
        try:
            while await self._take(connection):
                pass  # `_take` has returned, see `Server`
        except (Garbage, msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            sys.stderr.write(f"{self.name}: the connection is closed: {error}\n")
        finally:
            self._connection = None  # the next call connects again
            connection.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionLost(f"{self.name}: the connection ended"))

    async def _take(self, connection: Connection) -> bool:
        """Receive an answer and give it to its caller. Returns whether there was one."""
        if (received := await connection.receive()) is None:
            return False
        packed, frames = received
        answer = _answers.decode(packed)
        payloads = _join_payloads(answer.payloads, frames)
        future = self._waiting.get(answer.number)
        if future is None or future.done():
            self._cancel(answer.kept)
        else:
            future.set_result(Answered(answer.body, payloads, answer.error, answer.kept))
        return True


class Answered(NamedTuple):
    """An answer as the caller gets it; see `Answer`."""

    body: bytes
    payloads: list[Carried]
    error: str | None
    kept: int


def travels(payloads: Sequence[Any], body: bytes = b"") -> bool:
    """Whether the payloads fit into a message: none is a reference, and they are not too many or too large."""
    if not all(isinstance(payload, bytes | SharedFrame) for payload in payloads):
        return False
    inside = len(body) + sum(len(payload) for payload in payloads if isinstance(payload, bytes))
    return inside < MOST_BYTES // 2 and len(payloads) <= MOST_FRAMES


def _split_payloads(payloads: Sequence[Carried]) -> tuple[list[bytes | None], list[SharedFrame]]:
    """The payloads inside the message, and the frames beside it."""
    inside = [payload if isinstance(payload, bytes) else None for payload in payloads]
    return inside, [payload for payload in payloads if isinstance(payload, SharedFrame)]


def _join_payloads(inside: Sequence[bytes | None], frames: Sequence[SharedFrame]) -> list[Carried]:
    """The inverse of `_split_payloads`. Raises Garbage."""
    if inside.count(None) != len(frames):
        raise Garbage(f"a message names {inside.count(None)} frames, {len(frames)} came with it")
    following = iter(frames)
    return [next(following) if payload is None else payload for payload in inside]


def _send(connection: Connection, message: Call | Cancelled | Answer, frames: Sequence[SharedFrame] = ()) -> None:
    packed = bytearray(PROLOGUE)
    _encoder.encode_into(message, packed, PROLOGUE)
    connection.send(packed, frames)
