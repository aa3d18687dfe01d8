"""The services of a run, supervised: it reads their notices, grants devices in turn and replaces the ones that die.

Notices about devices, waits and lost rows are handled here. All others, and replacements, go to one queue, which the
controller consumes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from asyncflow.control.device_lease import Claim, shared_leases
from asyncflow.control.events import Notifier
from asyncflow.control.supervision.liveness import Liveness
from asyncflow.control.supervision.outcome import RunFailed, TrainerGone
from asyncflow.control.supervision.restart_policy import Resend, RestartPolicy
from asyncflow.control.supervision.silences import Silences
from asyncflow.control.supervision.wait_graph import WaitBoard
from asyncflow.control.supervision.with_retry import WithRetry
from asyncflow.services.channels.endpoint import (
    Endpoint,
    Payload,
    Requestable,
    ServiceError,
    ServiceGone,
    all_or_error,
    ask,
)
from asyncflow.services.channels.finished_prompts import FinishedPrompts
from protocols.control.delivery import Delivery, ServiceStatistics
from protocols.control.events import ServiceReplaced
from protocols.control.notices import LeaseAsked, LeaseReturned, Notice, RowsLost, ServiceFailed, Waiting
from protocols.control.replies import Done, Statistics
from protocols.control.requests import EndPrompts, GetStatistics, Grant, Redeliver, Request, YieldDevices


class Replaced(NamedTuple):
    """A service died and `successor` took its place. The successor has nothing yet of what the other services have."""

    event: ServiceReplaced
    successor: Endpoint


class ServiceSupervisor:
    """All services by name. `restart` starts a successor in the place of a dead service, `kill` makes one dead."""

    def __init__(
        self,
        services: Mapping[str, Endpoint],
        pools: Mapping[str, str],
        policy: RestartPolicy,
        restart: Callable[[str], Awaitable[Endpoint]],
        kill: Callable[[str], None],
        liveness: Liveness,
    ) -> None:
        self.services = dict(services)
        self.waits = WaitBoard()
        self._leases = shared_leases(pools)
        self._policy, self._restart = policy, restart
        self.silences = Silences(self.services, liveness, kill)
        # Replacements, and the notices that are not handled here; one that is not read stops the next poll.
        self.notices: asyncio.Queue[Notice | Replaced] = asyncio.Queue(1)
        self.deaths = policy.deaths  # service -> how often its process has died
        self.replacements: Counter[str] = Counter()  # service -> how often a successor has taken its place
        self._resident: dict[str, str] = {}  # pool -> the service that used its devices last
        self._stays: set[str] = set()  # services that have nothing to move off their devices
        self._replacing: set[str] = set()
        self._ready = dict(services)  # a successor joins when it has all it needs
        self._ready_changed = Notifier()
        self._to_resend: set[Resend] = set()
        self._resending: set[Resend] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._finished = FinishedPrompts()
        self._moved = time.monotonic()

    def __getitem__(self, name: str) -> Endpoint:
        return self.services[name]

    # --- notices and deaths

    def follow(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Tasks that read the services' notices for ever.

        They raise RunFailed or ServiceGone if the run can't go on, and TrainerGone if it has to roll back.

        Redeliveries join the list: one to a service that hangs must not outlive the rest.
        """
        self._tasks += [
            group.create_task(self._follow(name, group), name=f"notices of {name}") for name in self.services
        ]
        self._tasks += [group.create_task(self.silences.ping(name), name=f"pings to {name}") for name in self.services]
        return self._tasks

    async def _follow(self, name: str, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                notices = await self.services[name].notices()
            except ServiceGone as gone:
                await self.notices.put(await self._replace(name, gone, group))
                continue
            for notice in notices:
                await self._handle(name, notice, group)

    async def _handle(self, name: str, notice: Notice, group: asyncio.TaskGroup) -> None:
        match notice:
            case Waiting():
                self.waits.note(notice)
                return
            case LeaseAsked():
                await self._grant(self._leases[name].ask(Claim(name, notice.ticket, notice.stage)))
            case LeaseReturned():
                await self._grant(self._leases[name].give_back(name, notice.ticket))
            case RowsLost():
                self._send_again(self._policy.resend_to(notice.stage), group)
                return  # no progress: the watchdog has to see it if it never ends
            case ServiceFailed():
                raise RunFailed(f"{notice.stage} on {notice.service} failed: {notice.error}")
            case _:
                await self.notices.put(notice)
        self.mark_progress()

    async def _replace(self, name: str, gone: ServiceGone, group: asyncio.TaskGroup) -> Replaced:
        """Start a successor for a service whose process is gone. Raises as `follow` says if there can be none."""
        gone = self.silences.cause_of(name, gone)
        if self._policy.has_state(name):
            raise TrainerGone(name, str(gone)) from gone
        if not self._policy.replace(name, time.monotonic()):
            raise ServiceGone(f"{self._policy.refusal(name)}: {gone}") from gone
        start = time.monotonic()
        stages = self._policy.stages_of(name)
        for stage in stages:
            self.waits.note(Waiting(stage))
        if name in self._leases:
            await self._grant(self._leases[name].forget(name))
        self.waits.note(Waiting(name, "a successor", "", time.time()))
        self._replacing.add(name)
        while True:
            try:
                successor = await self._successor(name)
                break
            except ServiceError as error:  # it died as well, or could not start
                if not self._policy.replace(name, time.monotonic()):
                    raise ServiceError(f"{self._policy.refusal(name)}: {error}") from error
        self.services[name] = successor
        self.replacements[name] += 1
        self._replacing.discard(name)
        self.waits.note(Waiting(name))
        for stage in stages:
            self._send_again(self._policy.resend_to(stage), group)
        self.mark_progress()
        number, seconds = self.deaths[name], time.monotonic() - start
        event = ServiceReplaced(service=name, number=number, cause=str(gone), seconds=seconds)
        return Replaced(event, successor)

    async def _successor(self, name: str) -> Endpoint:
        """A new process that knows the finished prompts: it would hold their rows for ever."""
        successor = await self._restart(name)
        sent: list[tuple[int, int]] | None = None
        while sent != self._finished.runs:  # prompts may finish meanwhile
            sent = self._finished.runs
            await ask(successor, EndPrompts([], runs=sent))
        return successor

    @contextlib.asynccontextmanager
    async def on_replaced(self, replaced: Replaced) -> AsyncIterator[Endpoint]:
        """Give the successor what the other services have inside this block; it is ready at its end.

        If the successor dies inside the block, the block ends silently: the next successor gets a block of its own.
        """
        name, successor = replaced.event.service, replaced.successor
        self.waits.note(Waiting(name, "what the others have", "", time.time()))
        with contextlib.suppress(ServiceGone):
            yield successor
            if self.services[name] is successor:
                self._ready[name] = successor
                self._ready_changed.notify()
        self.waits.note(Waiting(name))

    def _send_again(self, resends: list[Resend], group: asyncio.TaskGroup) -> None:
        """Request redeliveries, in tasks: a sender waits for room, which its receiver makes while it is followed."""
        for resend in resends:
            self._to_resend.add(resend)
            if resend not in self._resending:
                self._resending.add(resend)
                self._tasks.append(group.create_task(self._resend(resend), name=f"redelivery to {resend.edge}"))

    async def _resend(self, resend: Resend) -> None:
        while resend in self._to_resend:  # again: a redelivery may have passed the rows that are lost during it
            self._to_resend.discard(resend)
            await self.tell(resend.service, Redeliver(resend.edge))
        self._resending.discard(resend)

    async def _grant(self, claim: Claim | None) -> None:
        """Grant a pool's devices to the next claim, after the previous service has left them."""
        if claim is None:
            return
        pool = self._leases[claim.service].pool
        before, self._resident[pool] = self._resident.get(pool, claim.service), claim.service
        if before != claim.service and before not in self._stays:
            await self._make_room(before, claim)
        await self.tell(claim.service, Grant(claim.ticket))

    async def _make_room(self, name: str, claim: Claim) -> None:
        """Have a service leave its devices. A service that has nothing to move, as on a CPU, is not asked again."""
        # The claim holds the lease already: as a wait for the lease it would wait for itself.
        self.waits.note(Waiting(claim.stage, "free devices", name, time.time()))
        with contextlib.suppress(ServiceGone):  # its memory is free, too; the task that follows it sees its death
            reply, _ = await ask(self.services[name], YieldDevices())
            if isinstance(reply, Done) and not reply.values.get("moves"):
                self._stays.add(name)
        self.waits.note(Waiting(claim.stage))

    # --- requests

    def with_retry(self, name: str) -> Requestable:
        """A service across its deaths: a request that one process could not answer is repeated to its successor.

        Only for requests that may be sent twice.
        """
        return WithRetry(name, self._ready, self._ready_changed, self._policy.may_die(name))

    async def wait_healthy(self) -> None:
        """Wait until no service is being replaced, as far as deaths are known."""
        while self._replacing or self._ready != self.services:
            await self._ready_changed.changed()

    async def deliver(self, name: str, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        """Deliver rows to a service. If it is being replaced they are lost here and sent again to its successor."""
        try:
            await self.services[name].deliver(delivery, payloads)
        except ServiceGone:
            if not self._policy.may_die(name):
                raise

    async def tell(self, name: str, request: Request) -> None:
        """Send a request; ignore the failure if the service is being replaced: its successor starts without state."""
        try:
            await ask(self.services[name], request)
        except ServiceGone:
            if not self._policy.may_die(name):
                raise

    async def end_prompts(self, prompts: list[int]) -> None:
        """Have every service drop the rows of finished prompts, and later successors refuse them."""
        for prompt in prompts:
            self._finished.add(prompt)
        async with all_or_error() as group:
            for name in self.services:
                group.create_task(self.tell(name, EndPrompts(prompts)), name=f"end prompts on {name}")

    async def statistics(self) -> list[ServiceStatistics]:
        """The channel statistics of every service. Raises ServiceError and names a service that does not answer."""
        replies = [await ask(service, GetStatistics()) for service in self.services.values()]
        return [reply.statistics for reply, _ in replies if isinstance(reply, Statistics)]

    # --- progress

    def mark_progress(self) -> None:
        """The run made progress."""
        self._moved = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """Time without progress; 0 while a successor starts, which has a deadline of its own."""
        return 0.0 if self._replacing else time.monotonic() - self._moved

    def current_waits(self) -> dict[str, str]:
        """stage -> "what on whom"."""
        silent = self.silences.current
        waits = {"controller": f"an answer on {', '.join(silent)}"} if silent else {}
        return waits | self.waits.current(self._silent_stages)

    def graph(self) -> list[str]:
        """The services that do not answer, then who waits for what on whom, one line an edge."""
        holders = {lease.pool: lease.holder.stage for lease in self._leases.values() if lease.holder is not None}
        silent = [f"{name} has not answered for {s:.0f} s" for name, s in self.silences.current.items()]
        return silent + self.waits.graph(time.time(), holders, self._silent_stages)

    @property
    def _silent_stages(self) -> set[str]:
        return {stage for name in self.silences.current for stage in self._policy.stages_of(name)}
