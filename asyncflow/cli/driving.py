"""Drives one run from the command line: its event loop, its signals, the live view and the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import uvloop

from asyncflow.cli.console import NotPrinted, err, out
from asyncflow.cli.interrupts import SAVED, SENTENCES, Interrupts
from asyncflow.cli.live import live_view
from asyncflow.cli.start_view import start_view
from asyncflow.client.run import Run
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.recipe.config import BadInput
from asyncflow.run.start_progress import StartProgress
from asyncflow.services.runtime.signals import STOPPING
from protocols.control.events import Evaluated, RunEnded

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def drive(
    context: AbstractAsyncContextManager[Run],
    evaluations: list[Evaluated] | None = None,
    *,
    port: int | None = None,
    progress: StartProgress | None = None,
) -> RunEnded:
    """Run to the end under uvloop, with the live view and the signal handlers.

    `evaluations` gets the run's. `port`: on which the run answers clients, 0 a free one, None: it answers none.
    `progress` is that of `context`'s start, and shown meanwhile.
    """
    if port is not None:
        from asyncflow.server.own_run import served

        context = served(context, port)
    driver = _Driver(evaluations if evaluations is not None else [], progress)
    return uvloop.run(driver.follow(context))


class _Driver:
    """The state that signals and the view of one run share."""

    def __init__(self, evaluations: list[Evaluated], progress: StartProgress | None) -> None:
        self._evaluations, self._progress = evaluations, progress
        self._interrupts = Interrupts()
        self._run: Run | None = None
        self._following: asyncio.Task[Any] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def follow(self, context: AbstractAsyncContextManager[Run]) -> RunEnded:
        """Start the run, show its events, wait for its end."""
        loop, self._following = asyncio.get_running_loop(), asyncio.current_task()
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                loop.add_signal_handler(number, self._interrupted, number)
        loop.add_signal_handler(signal.SIGUSR1, self._reload)
        try:
            with start_view(out, self._progress) as started:
                async with context as running:
                    self._run = running
                    with self._printing():
                        started()
                    ended = await self._show(running)
        except asyncio.CancelledError:
            code = self._interrupts.ended_at_once
            if self._run is None:
                _tell("interrupted before the run has started")
                code = self._interrupts.code_of(SAVED)  # nothing is lost
            return RunEnded(outcome="stopped", step=-1, error="interrupted", exit_code=code)
        if ended.outcome != "finished":
            _tell(f"to go on: asyncflow resume {shlex.quote(str(running.folder))}")
        return RunEnded(
            outcome=ended.outcome,
            step=ended.step,
            error=ended.error,
            exit_code=self._interrupts.code_of(ended.exit_code),
        )

    async def _show(self, running: Run) -> RunEnded:
        told = False
        with live_view(out) as show:
            with self._printing():
                out.print(f"run folder: {running.folder}", soft_wrap=True)
            async for event in running.events():
                with self._printing():
                    show(event)
                if out.closed and not told:
                    told = True
                    _tell("nobody reads the output any more")
                    self._interrupted(signal.SIGHUP)
        self._evaluations += running.evaluations
        return await running.wait()

    @contextlib.contextmanager
    def _printing(self) -> Iterator[None]:
        """A terminal or a reader that is gone stops the run; a full disk, where the output goes, does not."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                _tell(
                    f"{error.strerror}; the run goes on, and its log says the same: logs/controller.log in its folder"
                )
            else:
                out.on_broken_pipe()

    def _interrupted(self, number: signal.Signals) -> None:
        # Ray's handler of SIGTERM, which is in force while it is joined, aborts the process three seconds later.
        signal.alarm(0)
        assert self._following is not None
        action = self._interrupts.take(number, started=self._run is not None)
        if action in SENTENCES:
            _tell(SENTENCES[action])
        match action:
            case "drain" | "abandon":
                assert self._run is not None
                self._spawn(self._run.stop(abandon=action == "abandon"), "stop")
            case "cancel":
                self._following.cancel()
            case "exit":
                os._exit(self._interrupts.ended_at_once)
            case "wait":
                pass

    def _reload(self) -> None:
        if self._run is None:
            _tell("the run has not started yet: nothing is reloaded")
        else:
            self._spawn(_reload(self._run), "reload")

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _tell(text: str) -> None:
    with contextlib.suppress(NotPrinted):
        err.print(text, markup=False, soft_wrap=True)


async def _reload(running: Run) -> None:
    """Request a reload. Its result, or the end of the run, is an event, which the view shows."""
    with contextlib.suppress(BadInput, RunFailed):
        await running.reload()
