"""Devices go to who is next when who had them last has left; who dies has a successor that is given what it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from asyncflow.control.supervision.restart_policy import RestartPolicy
from asyncflow.control.supervision.service_supervisor import Replaced, ServiceSupervisor
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.trace import trace
from asyncflow.services.channels.endpoint import Endpoint, Payload, ServiceError, ServiceGone, ask
from protocols.control.delivery import Delivery
from protocols.control.notices import LeaseAsked, LeaseReturned, Notice, Waiting
from protocols.control.requests import Done, GetStatistics, Grant, Reply, Request, YieldDevices


class Sharing:
    """A service that shares devices. It keeps what it is asked in a book that all write. Implements `Endpoint`."""

    def __init__(self, name: str, book: list[str], moves: float) -> None:
        self.name = name
        self.heard: asyncio.Queue[Notice] = asyncio.Queue()
        self._book, self._moves = book, moves
        self.may_leave = asyncio.Event()
        self.may_leave.set()

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        raise NotImplementedError

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        match request:
            case YieldDevices():
                self._book.append(f"{self.name} leaves")
                await self.may_leave.wait()
                return Done({"moves": self._moves}), []
            case Grant():
                self._book.append(f"{self.name} works")
        return Done(), []

    async def notices(self) -> list[Notice]:
        return [await self.heard.get()]


@asynccontextmanager
async def sharing(book: list[str], moves: float) -> AsyncIterator[dict[str, Sharing]]:
    """Policy and reference on one pool, with their supervisor."""
    async with followed(book, moves) as (services, _):
        yield services


@asynccontextmanager
async def followed(book: list[str], moves: float) -> AsyncIterator[tuple[dict[str, Sharing], ServiceSupervisor]]:
    """The same, and the supervisor."""

    async def restart(name: str) -> Endpoint:
        raise NotImplementedError

    services = {name: Sharing(name, book, moves) for name in ("policy", "reference")}
    supervisor = ServiceSupervisor(
        services, dict.fromkeys(services, "main"), RestartPolicy(trace(ppo), {}, [], 0), restart
    )
    async with asyncio.TaskGroup() as group:
        tasks = supervisor.follow(group)
        yield services, supervisor
        for task in tasks:
            task.cancel()


async def nothing(successor: Endpoint) -> None:
    """A successor needs nothing of what the others have."""


async def prepare_successors(
    supervisor: ServiceSupervisor, book: list[str], prepare: Callable[[Endpoint], Awaitable[None]]
) -> None:
    """Take replacements from the queue as a controller does, and give each successor what it needs."""
    async with asyncio.TaskGroup() as group:
        while True:
            replaced = await supervisor.next_notice()
            assert isinstance(replaced, Replaced)
            book.append(f"{replaced.event.service} replaced")
            group.create_task(prepare_one(supervisor, replaced, prepare))


async def prepare_one(
    supervisor: ServiceSupervisor, replaced: Replaced, prepare: Callable[[Endpoint], Awaitable[None]]
) -> None:
    async with supervisor.on_replaced(replaced) as successor:
        await prepare(successor)


async def have_turns(services: dict[str, Sharing], book: list[str], *names: str) -> None:
    """Each asks, works and gives back, one after the other."""
    for ticket, name in enumerate(names):
        worked = book.count(f"{name} works")
        services[name].heard.put_nowait(LeaseAsked(ticket, name))
        async with asyncio.timeout(5):
            while book.count(f"{name} works") == worked:
                await asyncio.sleep(0)
        services[name].heard.put_nowait(LeaseReturned(ticket))


async def test_a_service_leaves_its_devices_before_another_one_works_on_them():
    book: list[str] = []
    async with sharing(book, moves=1.0) as services:
        await have_turns(services, book, "policy", "policy", "reference", "policy")
    assert book == [
        "policy works",
        "policy works",
        "policy leaves",
        "reference works",
        "reference leaves",
        "policy works",
    ]


async def test_who_has_nothing_to_move_is_asked_once():
    book: list[str] = []
    async with sharing(book, moves=0.0) as services:
        await have_turns(services, book, "policy", "reference", "policy", "reference")
    assert book == [
        "policy works",
        "policy leaves",
        "reference works",
        "reference leaves",
        "policy works",
        "reference works",
    ]


async def test_who_has_the_lease_waits_for_who_has_not_left_yet():
    book: list[str] = []
    async with followed(book, moves=1.0) as (services, supervisor):
        await have_turns(services, book, "policy")
        services["policy"].may_leave.clear()
        waiting = Waiting("reference", "lease", "main")
        services["reference"].heard.put_nowait(waiting)
        services["reference"].heard.put_nowait(LeaseAsked(7, "reference"))
        async with asyncio.timeout(5):
            while "policy leaves" not in book:
                await asyncio.sleep(0)
            assert [line.partition(" since")[0] for line in supervisor.graph()] == [
                "reference waits for free devices on policy"
            ]
            services["policy"].may_leave.set()
            while "reference works" not in book:
                await asyncio.sleep(0)
        assert supervisor.graph() == []


class Mortal(Sharing):
    """It answers until it dies, and then nobody."""

    def __init__(self, name: str, book: list[str]) -> None:
        super().__init__(name, book, moves=0.0)
        self.dies = asyncio.Event()

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        if self.dies.is_set():
            raise ServiceGone(f"{self.name}: its process is gone")
        self._book.append(type(request).__name__)
        return Done(), []

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        if self.dies.is_set():
            raise ServiceGone(f"{self.name}: its process is gone")

    async def notices(self) -> list[Notice]:
        await self.dies.wait()
        raise ServiceGone(f"{self.name}: its process is gone")


@asynccontextmanager
async def mortal(
    book: list[str], prepare: Callable[[Endpoint], Awaitable[None]], limit: int = 1, stillborn: int = 0
) -> AsyncIterator[tuple[Mortal, ServiceSupervisor]]:
    """A generator that may die so often, and its supervisor; so many of its successors die while they start."""
    services = {"generator": Mortal("generator", book)}

    async def restart(name: str) -> Endpoint:
        book.append("restart")
        if book.count("restart") <= stillborn:
            raise ServiceError(f"{name}: died while starting")
        return Mortal(name, book)

    supervisor = ServiceSupervisor(services, {}, RestartPolicy(trace(ppo), {}, ["generator"], limit), restart)
    async with asyncio.TaskGroup() as group:
        tasks = supervisor.follow(group)
        tasks.append(group.create_task(prepare_successors(supervisor, book, prepare)))
        yield services["generator"], supervisor
        for task in tasks:
            task.cancel()


async def test_what_a_dead_service_could_not_answer_is_asked_of_its_successor_once_that_has_what_it_needs():
    book: list[str] = []

    async def prepare(successor: Endpoint) -> None:
        book.append(f"{successor.name} is prepared")

    async with mortal(book, prepare) as (first, supervisor):
        first.dies.set()
        async with asyncio.timeout(5):
            await ask(supervisor.with_retry("generator"), GetStatistics())
    assert book == ["restart", "EndPrompts", "generator replaced", "generator is prepared", "GetStatistics"]


async def test_a_successor_that_dies_while_it_is_equipped_has_one_too_or_ends_the_run():
    book: list[str] = []

    async def prepare(successor: Endpoint) -> None:
        assert isinstance(successor, Mortal)
        successor.dies.set()
        await ask(successor, GetStatistics())

    with pytest.raises(ExceptionGroup) as ended:
        async with mortal(book, prepare) as (first, supervisor):
            first.dies.set()
            async with asyncio.timeout(5):
                await ask(supervisor.with_retry("generator"), GetStatistics())
    assert ended.group_contains(ServiceGone), "it may die once"
    assert book == ["restart", "EndPrompts", "generator replaced"]


async def test_a_successor_that_dies_while_it_starts_counts_as_a_death():
    book: list[str] = []
    async with mortal(book, nothing, limit=3, stillborn=2) as (first, supervisor):
        first.dies.set()
        async with asyncio.timeout(5):
            await ask(supervisor.with_retry("generator"), GetStatistics())
            await supervisor.wait_healthy()
    assert book == ["restart"] * 3 + ["EndPrompts", "generator replaced", "GetStatistics"]
    assert supervisor.deaths("generator") == 3
    with pytest.raises(ExceptionGroup) as ended:
        async with mortal([], nothing, limit=1, stillborn=1) as (first, supervisor):
            first.dies.set()
            async with asyncio.timeout(5):
                await ask(supervisor.with_retry("generator"), GetStatistics())
    assert ended.group_contains(ServiceError, match="died while starting")


async def test_rows_for_a_service_that_is_being_replaced_are_left_to_who_prepares_it():
    async with mortal([], nothing) as (first, supervisor):
        first.dies.set()
        await supervisor.deliver("generator", Delivery("an edge", 0, []), [])
