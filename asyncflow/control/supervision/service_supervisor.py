"""The services of a run as its controller sees them: followed, given devices in turn, replaced when they die.

What a service reports about devices, waits and its own death is dealt with here; all else goes to the controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from asyncflow.control.device_lease import Claim, shared_leases
from asyncflow.control.events import Notifier
from asyncflow.control.supervision.outcome import RunFailed
from asyncflow.control.supervision.supervision import Resend, Supervisor
from asyncflow.control.supervision.wait_graph import WaitBoard
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
from protocols.control.requests import (
    Done,
    EndPrompts,
    GetStatistics,
    Grant,
    Redeliver,
    Reply,
    Request,
    Statistics,
    YieldDevices,
)

OnNotice = Callable[[Notice], Awaitable[None]]
Replaced = Callable[[ServiceReplaced], None]
OnReplaced = Callable[[Endpoint], Awaitable[None]]


class ServiceSupervisor:
    """All services by name. `restart` starts a successor in the place of a service that is gone."""

    def __init__(
        self,
        services: Mapping[str, Endpoint],
        pools: Mapping[str, str],
        supervisor: Supervisor,
        restart: Callable[[str], Awaitable[Endpoint]],
    ) -> None:
        self.services = dict(services)
        self.waits = WaitBoard()
        self._leases = shared_leases(pools)
        self._supervisor, self._restart = supervisor, restart
        self._resident: dict[str, str] = {}  # pool -> the service that was on its devices last
        self._stays: set[str] = set()  # services that have nothing to move off their devices
        self._replacing: set[str] = set()
        self._equipped = dict(services)  # of those that were replaced, the successor once it has all it needs
        self._returns = Notifier()
        self._resending: set[Resend] = set()
        self._once_more: set[Resend] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = FinishedPrompts()
        self._moved = time.monotonic()

    def __getitem__(self, name: str) -> Endpoint:
        return self.services[name]

    # --- following

    def follow(
        self, group: asyncio.TaskGroup, on_notice: OnNotice, replaced: Replaced, on_replaced: OnReplaced
    ) -> list[asyncio.Task[None]]:
        """Tasks that hear the services out for ever. They raise RunFailed or ServiceGone where the run can't go on.

        Redeliveries join the list: one to a service that hangs must not outlive the rest.

        Args:
            replaced: is told of every service that took a dead one's place.
            equip: gives such a service what the others have; it is followed meanwhile.
        """
        self._tasks += [
            group.create_task(self._follow(name, group, on_notice, replaced, on_replaced), name=f"notices of {name}")
            for name in self.services
        ]
        return self._tasks

    async def _follow(
        self, name: str, group: asyncio.TaskGroup, on_notice: OnNotice, replaced: Replaced, on_replaced: OnReplaced
    ) -> None:
        while True:
            try:
                notices = await self.services[name].notices()
            except ServiceGone as gone:
                replaced(await self._replace(name, gone, group))
                self._tasks.append(group.create_task(self._equip(name, on_replaced), name=f"equip {name}"))
                continue
            for notice in notices:
                await self._note(name, notice, group, on_notice)

    async def _note(self, name: str, notice: Notice, group: asyncio.TaskGroup, on_notice: OnNotice) -> None:
        match notice:
            case Waiting():
                self.waits.note(notice)
                return
            case LeaseAsked():
                await self._grant(self._leases[name].ask(Claim(name, notice.ticket, notice.stage)))
            case LeaseReturned():
                await self._grant(self._leases[name].give_back(name, notice.ticket))
            case RowsLost():
                self._send_again(self._supervisor.resend_to(notice.stage), group)
                return  # no progress: where it goes on and on, the watchdog is to see it
            case ServiceFailed():
                raise RunFailed(f"{notice.stage} on {notice.service} failed: {notice.error}")
            case _:
                await on_notice(notice)
        self.mark_progress()

    async def _replace(self, name: str, gone: ServiceGone, group: asyncio.TaskGroup) -> ServiceReplaced:
        """Put a new service in the place of one whose process is gone, or give the run up."""
        replacement = self._supervisor.replace(name)
        if replacement is None:
            raise gone
        start = time.monotonic()
        for stage in replacement.stages:
            self.waits.note(Waiting(stage))
        if name in self._leases:
            await self._grant(self._leases[name].forget(name))
        self.waits.note(Waiting(name, "a successor", "", time.time()))
        self._replacing.add(name)
        while True:
            try:
                self.services[name] = await self._successor(name)
                break
            except ServiceError:  # it died as well, or could not start
                replacement = self._supervisor.replace(name)
                if replacement is None:
                    raise
        self._replacing.discard(name)
        self.waits.note(Waiting(name))
        self._send_again(replacement.resend, group)
        self.mark_progress()
        seconds = time.monotonic() - start
        return ServiceReplaced(service=name, number=replacement.number, cause=str(gone), seconds=seconds)

    async def _successor(self, name: str) -> Endpoint:
        """A new process in a service's place, which knows what has ended: old rows would sit in it for ever."""
        successor = await self._restart(name)
        told: list[tuple[int, int]] | None = None
        while told != self._ended.runs:  # prompts may end meanwhile
            told = self._ended.runs
            await ask(successor, EndPrompts([], runs=told))
        return successor

    async def _equip(self, name: str, on_replaced: OnReplaced) -> None:
        successor = self.services[name]
        self.waits.note(Waiting(name, "what the others have", "", time.time()))
        with contextlib.suppress(ServiceGone):  # then another one is equipped
            await on_replaced(successor)
            if self.services[name] is successor:
                self._equipped[name] = successor
                self._returns.notify()
        self.waits.note(Waiting(name))

    def _send_again(self, resends: list[Resend], group: asyncio.TaskGroup) -> None:
        """Have rows sent again. Each sender waits for room, which the receiver makes while it is followed."""
        for resend in resends:
            if resend in self._resending:
                self._once_more.add(resend)  # what was asked for meanwhile may have been passed already
                continue
            self._resending.add(resend)
            self._tasks.append(group.create_task(self._resend(resend), name=f"redelivery to {resend.edge}"))

    async def _resend(self, resend: Resend) -> None:
        self._once_more.add(resend)
        while resend in self._once_more:
            self._once_more.discard(resend)
            await self.tell(resend.service, Redeliver(resend.edge))
        self._resending.discard(resend)

    async def _grant(self, claim: Claim | None) -> None:
        """Give a pool's devices to who is next, when who was on them has made room."""
        if claim is None:
            return
        pool = self._leases[claim.service].pool
        before, self._resident[pool] = self._resident.get(pool, claim.service), claim.service
        if before != claim.service and before not in self._stays:
            await self._make_room(before, claim)
        await self.tell(claim.service, Grant(claim.ticket))

    async def _make_room(self, name: str, claim: Claim) -> None:
        """Have a service leave its devices. One with nothing to move, as on a CPU, says so and is not asked again."""
        # The lease it has already: it would be told to wait for itself.
        self.waits.note(Waiting(claim.stage, "free devices", name, time.time()))
        with contextlib.suppress(ServiceGone):  # its memory is free, too; who follows it sees its death
            reply, _ = await ask(self.services[name], YieldDevices())
            if isinstance(reply, Done) and not reply.values.get("moves"):
                self._stays.add(name)
        self.waits.note(Waiting(claim.stage))

    # --- asking

    def with_retry(self, name: str) -> Requestable:
        """A service that outlives its processes: what one could not answer is asked of its successor again.

        For what may be asked twice.
        """
        return _WithRetry(name, self)

    async def wait_healthy(self) -> None:
        """Wait until no service is being replaced, as far as deaths are known."""
        while self._replacing or self._equipped != self.services:
            await self._returns.changed()

    def deaths(self, name: str) -> int:
        """How often a service's process has died."""
        return self._supervisor.deaths(name)

    async def ask_with_retry(
        self, name: str, request: Request, payloads: Sequence[Payload]
    ) -> tuple[Reply, list[Payload]]:
        """See `with_retry`."""
        while True:
            service = self._equipped[name]
            try:
                return await service.request(request, payloads)
            except ServiceGone:
                if not self._supervisor.may_die(name):
                    raise
                while self._equipped[name] is service:  # who follows it replaces it, or ends the run
                    await self._returns.changed()

    async def deliver(self, name: str, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        """Hand rows to a service; one that is being replaced is sent them again by whoever equips it."""
        try:
            await self.services[name].deliver(delivery, payloads)
        except ServiceGone:
            if not self._supervisor.may_die(name):
                raise

    async def tell(self, name: str, request: Request) -> None:
        """Ask for something that a service which is being replaced need not hear: it starts with empty memory."""
        try:
            await ask(self.services[name], request)
        except ServiceGone:
            if not self._supervisor.may_die(name):
                raise

    async def end_prompts(self, prompts: list[int]) -> None:
        """Let every service forget the prompts that are over, and those that start later refuse them."""
        for prompt in prompts:
            self._ended.add(prompt)
        async with all_or_error() as group:
            for name in self.services:
                group.create_task(self.tell(name, EndPrompts(prompts)), name=f"end prompts on {name}")

    async def statistics(self) -> list[ServiceStatistics]:
        """What every service's channels did so far. Raises ServiceError naming one that does not answer."""
        replies = [await ask(service, GetStatistics()) for service in self.services.values()]
        return [reply.statistics for reply, _ in replies if isinstance(reply, Statistics)]

    # --- standing still

    def mark_progress(self) -> None:
        """Something moved."""
        self._moved = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """How long nothing has moved; a successor that is starting has a deadline of its own."""
        return 0.0 if self._replacing else time.monotonic() - self._moved

    def graph(self) -> list[str]:
        """Who waits for what on whom, a line an edge."""
        holders = {lease.pool: lease.holder.stage for lease in self._leases.values() if lease.holder is not None}
        return self.waits.graph(time.time(), holders)


class _WithRetry:
    """Implements `Requestable`."""

    def __init__(self, name: str, fleet: ServiceSupervisor) -> None:
        self.name = name
        self._fleet = fleet

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        return await self._fleet.ask_with_retry(self.name, request, payloads)
