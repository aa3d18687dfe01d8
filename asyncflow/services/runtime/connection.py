"""Connection: messages between two processes of one node, with shared frames as file descriptors.

    u32 length | u32 number of frames | message

A frame is sent as its file descriptor (SCM_RIGHTS). Descriptors arrive in the order of their messages, never after
them. `send` never waits; `drain` waits until little is unsent.

asyncio's streams, multiprocessing.connection and gRPC don't fit: none of them sends descriptors from an event loop, and
without descriptors each frame would be copied through the socket or through Ray's store.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence

from asyncflow.services.runtime.shared import SharedFrame

MOST_BYTES = 64 << 20  # of a message; a longer one is treated as garbage
MOST_FRAMES = 4096  # of one message
_PROLOGUE = struct.Struct("<II")
_USER = struct.Struct("3i")  # pid, uid, gid of the process behind a socket
_READ_BYTES = 1 << 18  # of one recvmsg
_READ_AHEAD_BYTES = 1 << 20  # that are buffered before `receive` is called
_UNSENT_BYTES = 1 << 16  # above which `drain` waits
_MOST_DESCRIPTORS = 253  # of one sendmsg, the kernel's SCM_MAX_FD
_DESCRIPTOR = array.array("i").itemsize
_RETRY_SECONDS = 0.01  # after ETOOMANYREFS: too many descriptors of this user are in flight


class Garbage(Exception):
    """The received bytes are not a message of this protocol, or the other end belongs to another user."""


class Connection:
    """One end of a connection, used in the event loop that created it. It ends when either end is closed."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes ownership of a non-blocking socket. Raises Garbage if another user is at its other end."""
        try:
            _check_user(connected)
        except Garbage:
            connected.close()
            raise
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._chunk = memoryview(bytearray(_READ_BYTES))
        self._room_for_descriptors = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR)
        self._read = bytearray()
        self._descriptors: deque[int] = deque()
        self._reading = False
        self._something_read = asyncio.Event()
        self._unsent: deque[tuple[memoryview, Sequence[SharedFrame]]] = deque()
        self._unsent_bytes = 0
        self._writing = False
        self._retry: asyncio.TimerHandle | None = None  # while the kernel accepts no descriptors
        self._little_unsent = asyncio.Event()
        self._little_unsent.set()
        self._over = False  # nothing more will be read
        self._broken: Exception | None = None
        self.closed = False
        self._read_on()

    async def receive(self) -> tuple[bytes, list[SharedFrame]] | None:
        """Receive a message and its frames; None if the connection has ended. Raises Garbage, OSError."""
        while (message := self._take()) is None:
            if self._over:
                if self._broken is not None:
                    raise self._broken
                if self._read:
                    raise Garbage("the other end closed in the middle of a message")
                return None
            self._something_read.clear()
            self._read_on()
            await self._something_read.wait()
        return message

    def send(self, packed: bytearray, frames: Sequence[SharedFrame] = ()) -> None:
        """Send a message, which starts after `PROLOGUE` free bytes. It is dropped if the other end is gone."""
        if self.closed:
            return
        _PROLOGUE.pack_into(packed, 0, len(packed) - _PROLOGUE.size, len(frames))
        message, first = memoryview(packed), 0
        while len(frames) - first > _MOST_DESCRIPTORS:  # each sendmsg with descriptors must send at least a byte
            self._unsent.append((message[:1], frames[first : first + _MOST_DESCRIPTORS]))
            message, first = message[1:], first + _MOST_DESCRIPTORS
        self._unsent.append((message, frames[first:]))
        self._unsent_bytes += len(packed)
        if not self._writing and self._retry is None:
            self._write()
        self._note_unsent()

    async def drain(self) -> None:
        """Wait until little is left to send, or nothing can be sent any more."""
        await self._little_unsent.wait()

    def close(self) -> None:
        """Close the connection at once and drop what was not sent. Idempotent."""
        if self.closed:
            return
        self.closed = self._over = True
        if self._reading:
            self._loop.remove_reader(self._socket)
        self._write_no_more()
        self._reading = False
        if self._retry is not None:
            self._retry.cancel()
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._read.clear()
        self._unsent.clear()
        self._little_unsent.set()
        self._something_read.set()

    # --- reading

    def _read_on(self) -> None:
        if not self._reading and not self._over:
            self._reading = True
            self._loop.add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        # Read to the last byte and the error behind it: uvloop no longer polls a socket that has an error.
        while self._reading and self._read_some():
            pass

    def _read_some(self) -> bool:
        """Read once. Returns whether there may be more."""
        try:
            count, beside, flags, _ = self._socket.recvmsg_into(
                [self._chunk], self._room_for_descriptors, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(error)
            return False
        for level, kind, content in beside:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._descriptors.extend(array.array("i", content[: len(content) - len(content) % _DESCRIPTOR]))
        if flags & socket.MSG_CTRUNC:  # this process has no free descriptors
            self._end(Garbage("descriptors of frames were lost on the way: is the limit of open files too low?"))
            return False
        if not count:
            self._end(None)
            return False
        self._read += self._chunk[:count]
        if len(self._read) > _READ_AHEAD_BYTES + self._wanted():
            self._reading = False
            self._loop.remove_reader(self._socket)
        self._something_read.set()
        return True

    def _end(self, error: Exception | None) -> None:
        """Stop reading."""
        if self._reading:
            self._loop.remove_reader(self._socket)
        self._over, self._broken, self._reading = True, error, False
        self._something_read.set()

    def _wanted(self) -> int:
        """The length of the message that is being received."""
        return _PROLOGUE.unpack_from(self._read)[0] if len(self._read) >= _PROLOGUE.size else 0

    def _take(self) -> tuple[bytes, list[SharedFrame]] | None:
        if len(self._read) < _PROLOGUE.size:
            return None
        length, frames = _PROLOGUE.unpack_from(self._read)
        if length > MOST_BYTES or frames > MOST_FRAMES:
            raise Garbage(
                f"a message of {length} bytes with {frames} frames, at most {MOST_BYTES} and {MOST_FRAMES} are accepted"
            )
        end = _PROLOGUE.size + length
        if len(self._read) < end:
            return None
        if len(self._descriptors) < frames:
            raise Garbage(f"a message came with {len(self._descriptors)} frames of {frames}")
        with memoryview(self._read) as read:
            message = bytes(read[_PROLOGUE.size : end])
        del self._read[:end]
        try:
            return message, [SharedFrame.received(self._descriptors.popleft()) for _ in range(frames)]
        except ValueError as error:
            raise Garbage(str(error)) from error

    # --- writing

    def _write(self) -> None:
        """Send as much as the socket accepts now, and the rest when it is writable again."""
        self._retry = None
        try:
            while self._unsent:
                message, frames = self._unsent[0]
                rights = array.array("i", [frame.fd for frame in frames])
                beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if frames else []
                sent = self._socket.sendmsg([message], beside)
                self._unsent_bytes -= sent
                if sent < len(message):  # the descriptors went with the first byte
                    self._unsent[0] = message[sent:], ()
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._socket, self._write)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                self._write_no_more()
                self._retry = self._loop.call_later(_RETRY_SECONDS, self._write)
            else:
                self._give_up(error)
        if not self._unsent:
            self._write_no_more()
        self._note_unsent()

    def _write_no_more(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._socket)

    def _give_up(self, error: OSError) -> None:
        """Stop sending. If the other end is gone, reading goes on to its last message."""
        self._unsent.clear()
        self._unsent_bytes = 0
        if not isinstance(error, BrokenPipeError | ConnectionResetError):
            self._end(error)

    def _note_unsent(self) -> None:
        if self._unsent_bytes > _UNSENT_BYTES:
            self._little_unsent.clear()
        else:
            self._little_unsent.set()


PROLOGUE = _PROLOGUE.size  # free bytes that `Connection.send` needs before a message


async def connect(name: str) -> Connection:
    """Connect to the socket of that name. Raises OSError (nobody listens, or no descriptor is free), Garbage."""
    connecting = _unix_socket()
    try:
        await asyncio.get_running_loop().sock_connect(connecting, _address(name))
        return Connection(connecting)
    except BaseException:
        connecting.close()
        raise


def listen(name: str, backlog: int) -> socket.socket:
    """A socket that listens under that name on this node. Raises OSError if the name is taken."""
    listener = _unix_socket()
    try:
        listener.bind(_address(name))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def _unix_socket() -> socket.socket:
    created = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    created.setblocking(False)
    return created


def _address(name: str) -> str:
    return f"\0asyncflow/{name}"  # abstract: no file, and gone with its process


def _check_user(connected: socket.socket) -> None:
    peer = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _USER.size)
    _, user, _ = _USER.unpack(peer)
    if user != os.getuid():
        raise Garbage(f"the other end runs as user {user}, this process as {os.getuid()}")
