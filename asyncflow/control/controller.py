"""The controller of a run: what clients ask of it, and its terms, one after the other.

    start or resume ──> term ──> the last step, a stop, or an error ──> the end
                         ▲  │ a service with trained state is gone
                         └──┘ all that is trained goes back to the last checkpoint, in a new term

What happens in a term is in term.py. What follows from a death is decided by the restart policy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Literal, Protocol

from asyncflow.control.client_requests import ClientRequests
from asyncflow.control.store.ledger import LedgerError
from asyncflow.control.store.run_log import RunLog
from asyncflow.control.store.storage import StorageFailed, is_shortage
from asyncflow.control.supervision.outcome import Outcome, RunFailed, outcome_of
from asyncflow.control.supervision.restart_policy import GiveUp, RestartPolicy
from asyncflow.control.term import Term
from asyncflow.services.channels.endpoint import ServiceError, causes
from protocols.control.delivery import ServiceStatistics
from protocols.control.events import CodeReloaded, RolledBack, RunEnded, RunStarted, StateChanged


class Terms(Protocol):
    """Opens the terms of a run."""

    async def find_dead(self, error: BaseException) -> dict[str, str]:
        """The services with trained state whose processes are gone, now that `error` has ended a term -> the cause."""
        ...

    async def open_next(self, before: Term) -> Term:
        """Bring all services into a new term, at the last checkpoint. Raises ServiceError if one can't be started.

        Raises BadInput or StorageFailed if no checkpoint can be used.
        """
        ...


class Controller:
    """One run's decisions. `run` is called once."""

    def __init__(
        self,
        first: Term,
        terms: Terms,
        policy: RestartPolicy,
        requests: ClientRequests,
        log: RunLog,
        started: RunStarted,
    ) -> None:
        """`started` is the run's first event."""
        self.events = log.events
        self._term, self._terms, self._policy = first, terms, policy
        self._requests, self._log, self._started = requests, log, started

    @property
    def version(self) -> int:
        """The number of committed steps."""
        return self._term.version

    # --- requests of clients

    async def pause(self) -> None:
        """Stop admitting, generating and forming batches; a step that is training is finished."""
        self._requests.paused = True
        await self._term.set_paused(True)
        self._log.emit(StateChanged(state="paused"))

    async def resume(self) -> None:
        """Continue after a pause."""
        self._requests.paused = False
        await self._term.set_paused(False)
        self._log.emit(StateChanged(state="running"))
        self._requests.changed.notify()

    async def checkpoint(self) -> str:
        """Write a checkpoint at the next boundary between steps; its folder. RunFailed if the run ends first."""
        return await self._requests.checkpoint(f"the run is over; its last checkpoint: {self._last_checkpoint}")

    async def reload(self) -> CodeReloaded:
        """Have all services take the changed files of the user's code at the next boundary between steps.

        Raises BadCode, with nothing changed, if one of the files can't be used; RunFailed if the run ends first.
        """
        return await self._requests.reload()

    async def statistics(self) -> list[ServiceStatistics]:
        """The channel statistics of every service so far. RunFailed if the run is over."""
        if self._requests.over:
            raise RunFailed("the run is over: its services are gone")
        return await self._term.statistics()

    def stop(self, *, abandon: bool = False) -> None:
        """Drain: finish the step that is training, write a checkpoint, end.

        `abandon`: give that step up now, not at the deadline, unless a model has finished it; also during a drain.
        """
        if not self._requests.stopping and not self._requests.over:
            self._requests.stopping = True
            self._log.emit(StateChanged(state="draining"))
            self._requests.changed.notify()
        if abandon:
            self._requests.abandons_step.set()

    # --- the run

    async def run(self) -> RunEnded:
        """Run to the last step, or until stopped. Returns the outcome, which every follower gets, too.

        Raises nothing but the CancelledError of its own task.
        """
        self._log.emit(self._started)
        try:
            ended = await self._run_terms()
        except asyncio.CancelledError:
            self._end(self._ended("stopped", 130, "ended at once, without draining"))
            await self._term.run_store.abandon()
            raise
        try:
            await self._term.run_store.finalize(ended)
        except Exception as error:  # noqa: BLE001 - it becomes the outcome
            code = 3 if isinstance(error, LedgerError) else max(ended.exit_code, 1)
            text = str(error) if isinstance(error, StorageFailed) else f"finalizing the run folder: {causes(error)}"
            # A disk that is full says so at each write: once is enough.
            first = ended.error if ended.error and is_shortage(ended.error) and is_shortage(text) else ""
            ended = self._ended("failed", code, first or "; and ".join(filter(None, [ended.error, text])))
        self._end(ended)
        return ended

    def _end(self, ended: RunEnded) -> None:
        self._requests.end(ended.error or ended.outcome)
        self._log.emit(ended)

    def _ended(self, outcome: Literal["finished", "stopped", "failed"], code: int, error: str) -> RunEnded:
        return RunEnded(outcome=outcome, step=self._term.version, error=error, exit_code=code)

    @property
    def _last_checkpoint(self) -> str:
        return self._term.run_store.last_checkpoint or "none"

    async def _run_terms(self) -> RunEnded:
        while True:
            try:
                return await self._term.run()
            except Exception as error:  # noqa: BLE001 - it becomes the outcome
                ended = await self._after(error)
            if ended is not None:
                return ended

    async def _after(self, error: Exception) -> RunEnded | None:
        """The outcome of the run that `error` ends; None where the run goes on in a new term."""
        outcome = outcome_of(error)
        if outcome.may_follow_a_death and (dead := await self._terms.find_dead(error)):
            return await self._roll_back(dead, outcome)
        if outcome.unexpected:
            self._log.file.exception("an unexpected error ends the run", exc_info=error)
        return self._ended("failed", outcome.exit_code, outcome.text)

    # --- rollbacks

    async def _roll_back(self, dead: Mapping[str, str], outcome: Outcome) -> RunEnded | None:
        """Open the next term, with as many tries as the policy allows. Returns what `_after` does."""
        began, committed = time.monotonic(), self._term.version
        who, cause = " and ".join(dead), "; ".join(dict.fromkeys(dead.values()))
        failure, opened, died = cause, False, list(dead)
        while not opened:
            decision = self._policy.roll_back(died, committed, time.monotonic())
            died = []  # what fails from here on is another try, and no other death of theirs
            if isinstance(decision, GiveUp):
                return self._ended("failed", outcome.exit_code, f"{decision.why}: {failure}")
            self._log.file.warning("%s died, the run rolls back: %s", who, failure)
            try:
                opened = await self._open_next(decision.after_seconds)
            except ServiceError as error:
                failure = causes(error)
            except Exception as error:  # noqa: BLE001 - it becomes the outcome
                return self._ended("failed", 1, f"{who} died: {cause}; and there is no way back: {causes(error)}")
            if self._requests.stopping:
                lost = f"{who} died while the run was to stop, and with it what was trained since the last checkpoint"
                return self._ended("stopped", 1, f"{lost}: {cause}; last checkpoint: {self._last_checkpoint}")
        step = self._term.version
        self._log.emit(
            RolledBack(
                step=step,
                lost_steps=committed - step,
                term=self._term.run_store.term,
                services=list(dead),
                cause=cause,
                seconds=time.monotonic() - began,
            )
        )
        return None

    async def _open_next(self, after_seconds: float) -> bool:
        """Open the next term after a while; False where the run is to stop before it is open."""
        opening = asyncio.create_task(self._open_later(after_seconds), name="a new term")
        try:
            while not opening.done() and not self._requests.stopping:
                changed = asyncio.create_task(self._requests.changed.changed(), name="a stop")
                await asyncio.wait({opening, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            if not opening.done():
                return False
            self._term = opening.result()
            return True
        finally:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)

    async def _open_later(self, after_seconds: float) -> Term:
        await asyncio.sleep(after_seconds)
        return await self._terms.open_next(self._term)
