"""User reward code runs in a process of its own, so that it may raise, hang or die without taking anything along.

The parent writes one msgpack request a line-free frame (u32 length, bytes) to the child's stdin and waits for the
answer with a deadline; a child that misses it is killed and replaced. One call, one row.
"""

from __future__ import annotations

import math
import os
import select
import struct
import subprocess
import sys
import time
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")


class RuleRequest(msgspec.Struct, frozen=True):
    """One response to score."""

    prompt: str
    response: str
    reference: str


class RuleAnswer(msgspec.Struct, frozen=True):
    """A score, or why there is none."""

    score: float | None = None
    error: str = ""


class RuleFailed(Exception):
    """A rule gave no score: raised, hung, died, or returned something that is no finite number."""


class RuleProcess:
    """A child process that answers for one rule. Starts lazily, restarts after a kill."""

    def __init__(self, rule: str, timeout_seconds: float) -> None:
        self._rule = rule
        self._timeout = timeout_seconds
        self._child: subprocess.Popen[bytes] | None = None

    def score(self, request: RuleRequest) -> float:
        """The rule's finite score. Raises RuleFailed with the cause."""
        fresh = self._child is None
        child = self._child = self._child or self._start()
        # The first call of a child pays for its start: interpreter, imports of the user's module.
        deadline = time.monotonic() + self._timeout + (30.0 if fresh else 0.0)
        try:
            _write(child, msgspec.msgpack.encode(request))
            answer = msgspec.msgpack.decode(_read(child, deadline), type=RuleAnswer)
        except TimeoutError:
            self.close()
            raise RuleFailed(f"rule {self._rule} gave no answer within {self._timeout:g} s") from None
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            self.close()
            raise RuleFailed(f"rule {self._rule} killed its process ({type(error).__name__})") from None
        if answer.score is None:
            raise RuleFailed(f"rule {self._rule}: {answer.error}")
        return answer.score

    def close(self) -> None:
        """Kill the child, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        return subprocess.Popen(
            [sys.executable, "-m", "workers.rewards.sandbox", self._rule],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )


def _write(child: subprocess.Popen[bytes], body: bytes) -> None:
    assert child.stdin is not None
    child.stdin.write(_LENGTH.pack(len(body)) + body)
    child.stdin.flush()


def _read(child: subprocess.Popen[bytes], deadline: float) -> bytes:
    (length,) = _LENGTH.unpack(_read_exactly(child, _LENGTH.size, deadline))
    return _read_exactly(child, length, deadline)


def _read_exactly(child: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
    assert child.stdout is not None
    descriptor, parts = child.stdout.fileno(), b""
    while len(parts) < count:
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise TimeoutError
        chunk = os.read(descriptor, count - len(parts))
        if not chunk:
            raise EOFError
        parts += chunk
    return parts


def _answer(rule: Any, request: RuleRequest) -> RuleAnswer:
    try:
        value = rule(request.prompt, request.response, request.reference)
    except Exception as error:  # noqa: BLE001 - whatever user code raises is this row's cause of failure
        return RuleAnswer(error=f"raised {type(error).__name__}: {error}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return RuleAnswer(error=f"returned {value!r:.60}, want a number")
    return (
        RuleAnswer(float(value))
        if math.isfinite(value)
        else RuleAnswer(error=f"returned {value}, want a finite number")
    )


def serve(name: str) -> None:
    """The child's loop: answers until its stdin closes. Anything the rule prints goes to stderr."""
    from workers.rewards.rules import rule_named

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    rule = rule_named(name)
    while head := requests.read(_LENGTH.size):
        request = msgspec.msgpack.decode(requests.read(_LENGTH.unpack(head)[0]), type=RuleRequest)
        body = msgspec.msgpack.encode(_answer(rule, request))
        answers.write(_LENGTH.pack(len(body)) + body)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
