"""Runs a user's reward rule in a process of its own, so that it may raise, hang or die without harming the service.

Messages in both directions are a u32 length and a msgpack body. The child reports when it is ready, then answers one
request at a time. A child that misses a deadline is killed with all processes that it started, and replaced.

Why not pebble's ProcessPool, which has deadlines too: it kills only the worker process, not the processes that a rule
started (a compiler, a test run), it unpickles whatever the worker sends, and output that a rule prints shares the
parent's streams. The service also needs to replace a rule's code between two rows.
"""

from __future__ import annotations

import numbers
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from protocols.control.requests import CodeSource
from workers.user_code import BadCode, function_in, install, new_module

START_SECONDS = 60.0  # deadline for the interpreter and the imports of the user's module
_LENGTH = struct.Struct("<I")
_FLOAT32_MAX = 3.4028234663852886e38  # a larger score would be infinite in its column
_CAUSE_CHARACTERS = 300


class RuleRequest(msgspec.Struct, frozen=True):
    """One response to score."""

    prompt: str
    response: str
    reference: str


class RuleAnswer(msgspec.Struct, frozen=True):
    """A score, or the cause of its absence."""

    score: float | None = None
    error: str = ""


class RuleFailed(Exception):
    """A rule gave no score: it raised, hung, died, or did not return a finite number."""


class RuleProcess:
    """A child process that runs one rule. It starts with the first request and restarts after a kill."""

    def __init__(self, rule: str, timeout_seconds: float, source: CodeSource | None = None) -> None:
        """`source` is the text of the rule's module. Every child runs this text, even if the file changes later."""
        self._rule, self._source = rule, source
        self._timeout = timeout_seconds
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None without a child."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the child. Raises RuleFailed, without leaving a child behind, if the rule's module can't be used."""
        if error := self._begin():
            self.close()
            raise RuleFailed(f"rule {self._rule}: {error}")

    def score(self, request: RuleRequest) -> float:
        """The rule's finite score. Raises RuleFailed with the cause."""
        if self._child is None:
            self._begin()
        assert self._child is not None
        answer = self._exchange(self._child, _framed(request), self._timeout, "gave no answer")
        if answer.score is None:
            raise RuleFailed(f"rule {self._rule} {answer.error}")
        return answer.score

    def close(self) -> None:
        """Kill the child, if there is one, and the processes that it started."""
        if (child := self._child) is None:
            return
        self._child = None
        os.killpg(child.pid, signal.SIGKILL)  # the group exists until `wait` has reaped its leader
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()

    def _begin(self) -> str:
        """Start the child and have it load the rule. Returns the reason if it can't, else ""."""
        self._child = self._start()
        return self._exchange(self._child, _framed(self._source), START_SECONDS, "was not ready").error

    def _exchange(self, child: subprocess.Popen[bytes], sent: bytes, seconds: float, late: str) -> RuleAnswer:
        deadline = time.monotonic() + seconds
        try:
            _write(child, sent, deadline)
            return msgspec.msgpack.decode(_read(child, deadline), type=RuleAnswer)
        except TimeoutError:
            self.close()
            raise RuleFailed(f"rule {self._rule} {late} within {seconds:g} s") from None
        except (OSError, EOFError):
            self.close()
            raise RuleFailed(f"rule {self._rule} ended its process, {_ending(child.returncode)}") from None
        except msgspec.MsgspecError as error:
            self.close()
            raise RuleFailed(f"rule {self._rule} wrote into the answers of its process: {error}") from None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        child = subprocess.Popen(
            [sys.executable, "-m", "workers.rewards.sandbox", self._rule],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a buffer that a dead child never read would raise again when its pipe is closed
            env=environment,
            start_new_session=True,  # its own process group, to be killed as one
        )
        assert child.stdin is not None
        os.set_blocking(child.stdin.fileno(), False)
        return child


def _framed(body: RuleRequest | RuleAnswer | CodeSource | None) -> bytes:
    packed = msgspec.msgpack.encode(body)
    return _LENGTH.pack(len(packed)) + packed


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _write(child: subprocess.Popen[bytes], data: bytes, deadline: float) -> None:
    assert child.stdin is not None
    left = memoryview(data)
    while left:
        _await(child.stdin.fileno(), select.POLLOUT, deadline)
        left = left[os.write(child.stdin.fileno(), left) :]


def _read(child: subprocess.Popen[bytes], deadline: float) -> bytes:
    (length,) = _LENGTH.unpack(_read_exactly(child, _LENGTH.size, deadline))
    return _read_exactly(child, length, deadline)


def _read_exactly(child: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
    assert child.stdout is not None
    data = bytearray()
    while len(data) < count:
        _await(child.stdout.fileno(), select.POLLIN, deadline)
        chunk = os.read(child.stdout.fileno(), count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _await(descriptor: int, event: int, deadline: float) -> None:
    """Wait until a descriptor is ready. Raises TimeoutError. Unlike select, poll accepts descriptors above 1023."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


# --- the child


def serve(name: str) -> None:
    """The child's main loop: loads the rule's module, then answers requests until their stream ends."""
    requests, answers = _take_over_pipes()
    source = msgspec.msgpack.decode(_next(requests) or b"\xc0", type=CodeSource | None)
    error = ""
    try:
        rule = _loaded(name, source)
    except (BadCode, LookupError) as refused:
        error = str(refused.args[0])
        rule = _failing(error)  # every row gets this cause, without a new process each
    answers.write(_framed(_refusal(error)))
    while body := _next(requests):
        answers.write(_framed(_answer(rule, msgspec.msgpack.decode(body, type=RuleRequest))))


def _next(requests: BinaryIO) -> bytes:
    """The next message's body; empty at the end of the stream."""
    head = requests.read(_LENGTH.size)
    return requests.read(_LENGTH.unpack(head)[0]) if head else b""


def _loaded(name: str, source: CodeSource | None) -> Callable[[str, str, str], object]:
    """The rule, loaded from its module's text if there is one. Raises BadCode or LookupError."""
    if source is None:
        from workers.rewards.rules import rule_named

        return rule_named(name)
    with new_module(source) as module:
        rule = function_in(module, name)
    install(module)
    return rule


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes to descriptors that no subprocess inherits; the rule's stdin is empty, its stdout is stderr."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _failing(cause: str) -> Callable[[str, str, str], float]:
    def rule(prompt: str, response: str, reference: str) -> float:
        raise LookupError(cause)

    return rule


def _answer(rule: Callable[[str, str, str], object], request: RuleRequest) -> RuleAnswer:
    try:
        value = rule(request.prompt, request.response, request.reference)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return _refusal(f"returned {value!r}, want a number")
        score = float(value)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever user code raises is the row's cause of failure
        return _refusal(f"raised {type(error).__name__}: {error}")
    if not abs(score) <= _FLOAT32_MAX:
        return _refusal(f"returned {score}, want a finite number that float32 holds")
    return RuleAnswer(score)


def _refusal(cause: str) -> RuleAnswer:
    return RuleAnswer(error=cause[:_CAUSE_CHARACTERS].encode(errors="backslashreplace").decode())


if __name__ == "__main__":
    serve(sys.argv[1])
