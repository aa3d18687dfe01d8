"""The terms of a run: each has a supervisor, a ledger and a `Term` of its own, over the same services.

    a trainer died ──> the next term's number, the newest valid checkpoint
                   ──> services with state: new processes, which restore the checkpoint
                   ──> other services: drop the old term's rows; new processes where they don't in time
                   ──> the checkpoint's ledger ──> Term

A restart of a whole run makes the same steps, with all of its processes new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from asyncflow.control.client_requests import ClientRequests
from asyncflow.control.evaluation import Evaluations
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.store.run_log import RunLog
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.liveness import Liveness
from asyncflow.control.supervision.outcome import TrainerGone, leaves_of
from asyncflow.control.supervision.restart_policy import RestartPolicy
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.term import Term
from asyncflow.control.user_code import UserCode
from asyncflow.observe.exporter import ScrapeTarget, write_targets
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.service_specs import GENERATOR, NO_DEVICE, pools_of, replaceable, services_of, stateful
from asyncflow.run import run_folder
from asyncflow.services.channels.endpoint import Endpoint, ServiceError, ServiceGone, all_or_error, ask
from asyncflow.services.runtime import Runtime, Started
from protocols.control.requests import BeginTerm, LoadState, Ping

T = TypeVar("T")

CONTROLLER = "controller"


class RunTerms:
    """Opens the terms of one run. Implements `Terms`. `services` holds the current process of each service."""

    def __init__(
        self,
        checked: Checked,
        folder: Path,
        runtime: Runtime,
        services: dict[str, Started],
        code: UserCode,
        requests: ClientRequests,
        log: RunLog,
        metrics_port: int,
    ) -> None:
        """`metrics_port`: of the controller's own endpoint."""
        recipe, dataflow = checked.recipe, checked.dataflow
        self._checked, self._folder, self._runtime, self._services = checked, folder, runtime, services
        self._code, self._requests, self._log, self._port = code, requests, log, metrics_port
        self._answer_seconds = recipe.deadlines.answer
        self._stateful, self._replaceable = stateful(dataflow), replaceable(recipe, dataflow)
        self.policy = RestartPolicy(
            dataflow,
            services_of(recipe, dataflow),
            self._replaceable,
            self._stateful,
            recipe.failures.restarts,
            recipe.failures.restart_window_seconds,
        )
        self._write_targets()

    def open(self, start: run_folder.Start) -> Term:
        """A term whose services are ready for it. Raises StorageFailed."""
        recipe, dataflow = self._checked.recipe, self._checked.dataflow
        run_store = RunStore(
            folder=self._folder,
            term=start.term,
            ledger=Ledger(self._folder / "ledger.db"),
            checkpoints=recipe.checkpoints,
            stateful=self._stateful,
            recipe_digest=run_folder.digest_of(recipe),
            log=self._log,
            restored=start.restore,
        )
        supervisor = self._supervisor(start.term)
        generator = GENERATOR if GENERATOR in self._services else "policy"
        return Term(
            pace=recipe.pace,
            deadlines=recipe.deadlines,
            dataflow=dataflow,
            supervisor=supervisor,
            generator=generator,
            store=self._runtime.store,
            source=self._checked.train,
            evaluations=Evaluations(
                self._checked.heldout, recipe.evaluation.every, self._runtime.store, generator, supervisor, run_store
            ),
            run_store=run_store,
            code=self._code,
            requests=self._requests,
        )

    def _supervisor(self, term: int) -> ServiceSupervisor:
        deadlines, successors = self._checked.recipe.deadlines, self._replaceable
        pools = pools_of(self._checked.recipe, self._checked.dataflow)

        async def restart(name: str) -> Endpoint:
            await self._restart([name], term)
            return self._services[name].endpoint

        return ServiceSupervisor(
            {name: service.endpoint for name, service in self._services.items()},
            {service: pool for service, pool in pools.items() if pool != NO_DEVICE},
            self.policy,
            restart,
            self._runtime.kill,
            Liveness(deadlines.answer, lambda s: deadlines.answer if s in successors else deadlines.give_up),
        )

    # --- deaths of services with state

    async def find_dead(self, error: BaseException) -> dict[str, str]:
        """See `Terms.find_dead`. They are asked, since a death is not always what is noticed first."""
        dead = {gone.service: str(gone) for gone in leaves_of(error) if isinstance(gone, TrainerGone)}
        asked = [name for name in self._stateful if name not in dead]
        answers = await asyncio.gather(*(self._cause_of_death(name) for name in asked))
        return dead | {name: cause for name, cause in zip(asked, answers, strict=True) if cause}

    async def _cause_of_death(self, name: str) -> str:
        """Why a service is gone, or as good as gone; "" for one that answers."""
        try:
            async with asyncio.timeout(self._answer_seconds):
                await self._services[name].endpoint.request(Ping())
        except ServiceGone as gone:
            return str(gone)
        except TimeoutError:  # a rollback kills it
            return f"{name} has not answered for {self._answer_seconds:g} s"
        except ServiceError:  # it can't be reached at the moment, and may live: then it is not what ended the term
            return ""
        return ""

    async def open_next(self, before: Term) -> Term:
        """See `Terms.open_next`."""
        start = await _in_thread(run_folder.begin_rollback, self._folder)
        for warning in start.warnings:
            self._log.file.warning("%s", warning)
        others = [name for name in self._services if name not in self._stateful]
        async with all_or_error() as group:
            group.create_task(self._restart(self._stateful, start.term), name="restart what has state")
            begun = [group.create_task(self._begin_term(name, start.term), name=f"new term: {name}") for name in others]
        failed = [name for name, task in zip(others, begun, strict=True) if not task.result()]
        if failed:
            await self._restart(failed, start.term)
        restoring = restore(self._services, self._stateful, start.restore)
        await _in_time("restoring the checkpoint", self._checked.recipe.deadlines.checkpoint, restoring)
        await before.run_store.close()
        with run_folder.writing(self._folder):
            await _in_thread(run_folder.switch_ledger, self._folder, start)
            return self.open(start)

    async def _begin_term(self, name: str, term: int) -> bool:
        """Have a service begin a term. False where it has to be restarted for it: then it is killed already."""
        service = self._services[name].endpoint
        try:
            async with asyncio.timeout(self._answer_seconds):
                await ask(service, BeginTerm(term))
                # The death may have come while some services had switched to new code and others had not.
                await self._code.give_running(service)
        except (ServiceError, TimeoutError) as error:
            self._log.file.warning("%s does not begin term %d and is restarted: %s", name, term, error or "no answer")
            self._runtime.kill(name)  # those that connect to it would wait for one that hangs
            return False
        return True

    # --- processes

    async def _restart(self, names: Sequence[str], term: int) -> None:
        self._services.update(await self._runtime.restart(names, term))
        for name in names:
            giving = self._code.give_running(self._services[name].endpoint)
            await _in_time(f"{name}: taking the running code", self._answer_seconds, giving)
        self._write_targets()

    def _write_targets(self) -> None:
        run = self._folder.name
        targets = [ScrapeTarget(address=s.address, role=n, rank=0, run=run) for n, s in self._services.items()]
        targets.append(ScrapeTarget(address=f"127.0.0.1:{self._port}", role=CONTROLLER, rank=0, run=run))
        write_targets(self._folder / "metrics" / "targets.json", targets)


async def _in_time(what: str, seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Wait for something. Raises ServiceError past its deadline."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise ServiceError(f"{what} took longer than {seconds:g} s") from None


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a thread. A cancellation waits for its end: it writes to a folder that then is unlocked."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise


async def restore(services: dict[str, Started], names: Sequence[str], checkpoint: str) -> None:
    """Have services load their state from a checkpoint's folder; "": they start as their models are."""
    if checkpoint:
        async with all_or_error() as group:
            for name in names:
                loading = ask(services[name].endpoint, LoadState(f"{checkpoint}/{name}"))
                group.create_task(loading, name=f"restore {name}")
