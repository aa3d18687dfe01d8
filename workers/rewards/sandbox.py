"""One process that runs a user's reward rule, so that it may raise, hang or die without harming the service.

The service speaks to it through pipes, without ever blocking (exchange.py); `sandbox_pool` decides what each process
does, and kills one that misses a deadline, with all processes that it started. What it prints passes through here, so
that it can be limited.

Why not pebble's ProcessPool, which has deadlines too: it kills only the worker process, not the processes that a rule
started (a compiler, a test run), it unpickles whatever the worker sends, and output that a rule prints shares the
parent's streams. The service also needs to replace a rule's code between two rows.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from protocols.control.code import CodeSource
from workers.rewards.arguments import RuleRow
from workers.rewards.exchange import OUT_OF_MEMORY, Answers, Call, Ready, RuleLimits, Setup, framed, take_frame
from workers.user_code import here

START_SECONDS = 60.0  # deadline for the interpreter and the imports of the user's module
_READ_BYTES = 1 << 16
_answers, _ready = msgspec.msgpack.Decoder(Answers), msgspec.msgpack.Decoder(Ready)


class SandboxDied(Exception):
    """The process is gone, or what it wrote is no answer; the message continues "rule NAME ..."."""

    def __init__(self, cause: str, answered: Sequence[tuple[CallInFlight, Answers]] = ()) -> None:
        super().__init__(cause)
        self.answered = answered  # the calls whose answers came before what is no answer


class CallInFlight(msgspec.Struct):
    """A call that the process has not answered."""

    rows: list[int]  # the caller's numbers of its rows
    start: float  # time.monotonic()
    deadline: float
    alone: bool  # no other call may run beside it


class Sandbox:
    """A process of one rule. Until it is `ready` it takes no call."""

    def __init__(self, rule: str, source: CodeSource | None, limits: RuleLimits, selector: selectors.BaseSelector):
        """`source` is the text of the rule's module: the process runs this text, even if the file changes later.

        The selector is told what the process waits for; its events carry the sandbox.
        """
        self.calls: dict[int, CallInFlight] = {}
        self.ready: Ready | None = None
        self.started = time.monotonic()
        self._selector, self._next = selector, 0
        self._unsent, self._read = bytearray(), bytearray()
        self._limits, self._printed = limits, 0  # bytes, since the last answer
        folders = (absolute for folder in sys.path for absolute in ([folder] if folder else here()))
        path = os.pathsep.join(dict.fromkeys(folders))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "workers.rewards.rule_process", rule],  # -P: no module comes from the cwd
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # a buffer that a dead child never read would raise again when its pipe is closed
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # its own process group, to be killed as one
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self._in, self._out, self._err = self._child.stdin, self._child.stdout, self._child.stderr
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe.fileno(), False)
        for pipe in (self._out, self._err):
            selector.register(pipe, selectors.EVENT_READ, self)
        self._send(framed(Setup(source, limits)))

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs. It is not reaped here: the kill of its group needs it."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return ended is None

    @property
    def deadline(self) -> float:
        """When it has to have started, or to have answered its oldest call; infinite while it has nothing to do."""
        if self.ready is None:
            return self.started + START_SECONDS
        return min((call.deadline for call in self.calls.values()), default=float("inf"))

    @property
    def late(self) -> str:
        """The cause for a process that did not start in time."""
        return f"was not ready within {START_SECONDS:g} s"

    def call(self, rows: Sequence[RuleRow], numbers: list[int], deadline: float, *, alone: bool) -> None:
        """Have it score these rows."""
        self._next += 1
        self.calls[self._next] = CallInFlight(numbers, time.monotonic(), deadline, alone)
        self._send(framed(Call(self._next, list(rows))))

    def exchange(self) -> list[tuple[CallInFlight, Answers]]:
        """Write and read what the pipes take and hold. Returns the calls that were answered. Raises SandboxDied."""
        if self._unsent:
            self._send(b"")
        self._pass_output_on()
        if 0 < self._limits.output_bytes < self._printed:
            raise SandboxDied(f"printed more than failures.reward_output_bytes = {self._limits.output_bytes} in a call")
        ended = False
        with contextlib.suppress(BlockingIOError):
            while not ended:
                data = os.read(self._out.fileno(), _READ_BYTES)
                ended = not data
                self._read += data
                if len(data) < _READ_BYTES:
                    break
        answered: list[tuple[CallInFlight, Answers]] = []
        try:
            self._take_messages(answered)
        except (ValueError, RecursionError) as error:  # of msgspec; bytes that are no UTF-8 give a UnicodeDecodeError
            raise SandboxDied(f"wrote into the answers of its process: {error}", answered) from None
        if answered or ended:
            self._pass_output_on()
            self._printed = 0
        if ended:
            raise SandboxDied(f"ended its process, {self._ending()}", answered)
        return answered

    def close(self) -> None:
        """Kill the process and those that it started. Idempotent."""
        for pipe in (self._in, self._out, self._err):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(pipe)
        if self._child.returncode is None:  # its group exists until it is reaped
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        for pipe in (self._in, self._out, self._err):
            pipe.close()

    def _pass_output_on(self) -> None:
        """Write what was printed to this process's stderr: a pipe's content at most."""
        try:
            data = os.read(self._err.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            with contextlib.suppress(KeyError):  # the process has closed it, and may live on
                self._selector.unregister(self._err)
        self._printed += len(data)
        with contextlib.suppress(OSError):  # this process has no stderr any more
            while data:
                data = data[os.write(2, data) :]

    def _send(self, data: bytes) -> None:
        self._unsent += data
        try:
            while self._unsent:
                del self._unsent[: os.write(self._in.fileno(), self._unsent)]
        except BlockingIOError:
            with contextlib.suppress(KeyError):  # registered already
                self._selector.register(self._in, selectors.EVENT_WRITE, self)
            return
        except OSError:  # it reads no more; its answers so far, and then its end, are still to be read
            self._unsent.clear()
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._in)

    def _take_messages(self, answered: list[tuple[CallInFlight, Answers]]) -> None:
        """Add the calls that whole messages answer. Raises ValueError or RecursionError for what is no answer."""
        while (body := take_frame(self._read)) is not None:
            if self.ready is None:
                self.ready = _ready.decode(body)
                continue
            answers = _answers.decode(body)
            call = self.calls.get(answers.number)
            if call is None:
                raise ValueError(f"an answer to call {answers.number}, which is not in flight")
            if len(answers.answers) != len(call.rows):  # the call stays in flight: its rows have no answer
                raise ValueError(f"{len(answers.answers)} answers to a call of {len(call.rows)} rows")
            answered.append((self.calls.pop(answers.number), answers))

    def _ending(self) -> str:
        """How the process ended; kills what is left of it, which changes nothing in a process that is ending."""
        self.close()
        code = self._child.returncode
        if code == OUT_OF_MEMORY:
            return f"out of memory: failures.reward_memory_bytes = {self._limits.memory_bytes}"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
