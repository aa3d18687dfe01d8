"""The next claim gets the devices when the previous service has left them; a dead service gets a prepared successor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from asyncflow.control.supervision.liveness import Liveness
from asyncflow.control.supervision.restart_policy import RestartPolicy
from asyncflow.control.supervision.service_supervisor import Replaced, ServiceSupervisor
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.trace import trace
from asyncflow.services.channels.endpoint import Endpoint, Payload, ServiceError, ServiceGone, ask
from protocols.control.delivery import Delivery
from protocols.control.events import ServiceSilent
from protocols.control.notices import LeaseAsked, LeaseReturned, Notice, Waiting
from protocols.control.replies import Done, Reply
from protocols.control.requests import GetStatistics, Grant, Ping, Request, YieldDevices


class Sharing:
    """A service that shares devices and appends its requests to a shared list. Implements `Endpoint`."""

    def __init__(self, name: str, calls: list[str], moves: float) -> None:
        self.name = name
        self.heard: asyncio.Queue[Notice] = asyncio.Queue()
        self._calls, self._moves = calls, moves
        self.may_leave = asyncio.Event()
        self.may_leave.set()

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        raise NotImplementedError

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        match request:
            case YieldDevices():
                self._calls.append(f"{self.name} leaves")
                await self.may_leave.wait()
                return Done({"moves": self._moves}), []
            case Grant():
                self._calls.append(f"{self.name} works")
        return Done(), []

    async def notices(self) -> list[Notice]:
        return [await self.heard.get()]


@asynccontextmanager
async def sharing(calls: list[str], moves: float) -> AsyncIterator[dict[str, Sharing]]:
    """Policy and reference on one pool, supervised."""
    async with followed(calls, moves) as (services, _):
        yield services


@asynccontextmanager
async def followed(calls: list[str], moves: float) -> AsyncIterator[tuple[dict[str, Sharing], ServiceSupervisor]]:
    """Policy and reference on one pool, with their supervisor."""

    async def restart(name: str) -> Endpoint:
        raise NotImplementedError

    services = {name: Sharing(name, calls, moves) for name in ("policy", "reference")}
    supervisor = ServiceSupervisor(
        services,
        dict.fromkeys(services, "main"),
        RestartPolicy(trace(ppo), {}, [], [], 0, 60.0),
        restart,
        kill,
        Liveness(60.0, lambda _: 60.0),
    )
    async with asyncio.TaskGroup() as group:
        tasks = supervisor.follow(group)
        yield services, supervisor
        for task in tasks:
            task.cancel()


def kill(name: str) -> None:
    raise NotImplementedError


async def nothing(successor: Endpoint) -> None:
    """Prepares a successor that needs nothing."""


async def prepare_successors(
    supervisor: ServiceSupervisor, calls: list[str], prepare: Callable[[Endpoint], Awaitable[None]]
) -> None:
    """Take replacements from the queue like a controller, and prepare each successor."""
    async with asyncio.TaskGroup() as group:
        while True:
            replaced = await supervisor.notices.get()
            assert isinstance(replaced, Replaced)
            calls.append(f"{replaced.event.service} replaced")
            group.create_task(prepare_one(supervisor, replaced, prepare))


async def prepare_one(
    supervisor: ServiceSupervisor, replaced: Replaced, prepare: Callable[[Endpoint], Awaitable[None]]
) -> None:
    async with supervisor.on_replaced(replaced) as successor:
        await prepare(successor)


async def have_turns(services: dict[str, Sharing], calls: list[str], *names: str) -> None:
    """Each service claims the devices, works and gives them back, one after the other."""
    for ticket, name in enumerate(names):
        worked = calls.count(f"{name} works")
        services[name].heard.put_nowait(LeaseAsked(ticket, name))
        async with asyncio.timeout(60):
            while calls.count(f"{name} works") == worked:
                await asyncio.sleep(0)
        services[name].heard.put_nowait(LeaseReturned(ticket))


async def test_a_service_leaves_its_devices_before_another_one_works_on_them():
    calls: list[str] = []
    async with sharing(calls, moves=1.0) as services:
        await have_turns(services, calls, "policy", "policy", "reference", "policy")
    assert calls == [
        "policy works",
        "policy works",
        "policy leaves",
        "reference works",
        "reference leaves",
        "policy works",
    ]


async def test_who_has_nothing_to_move_is_asked_once():
    calls: list[str] = []
    async with sharing(calls, moves=0.0) as services:
        await have_turns(services, calls, "policy", "reference", "policy", "reference")
    assert calls == [
        "policy works",
        "policy leaves",
        "reference works",
        "reference leaves",
        "policy works",
        "reference works",
    ]


async def test_who_has_the_lease_waits_for_who_has_not_left_yet():
    calls: list[str] = []
    async with followed(calls, moves=1.0) as (services, supervisor):
        await have_turns(services, calls, "policy")
        services["policy"].may_leave.clear()
        waiting = Waiting("reference", "lease", "main")
        services["reference"].heard.put_nowait(waiting)
        services["reference"].heard.put_nowait(LeaseAsked(7, "reference"))
        async with asyncio.timeout(60):
            while "policy leaves" not in calls:
                await asyncio.sleep(0)
            assert [line.partition(" since")[0] for line in supervisor.graph()] == [
                "reference waits for free devices on policy"
            ]
            services["policy"].may_leave.set()
            while "reference works" not in calls:
                await asyncio.sleep(0)
        assert supervisor.graph() == []


class Mortal(Sharing):
    """A service that answers until it is stopped or dies."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__(name, calls, moves=0.0)
        self.dies, self.stopped = asyncio.Event(), asyncio.Event()

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        if self.stopped.is_set():
            await self.dies.wait()
        if self.dies.is_set():
            raise ServiceGone(f"{self.name}: its process is gone")
        if isinstance(request, Ping):
            return Done(), []
        self._calls.append(type(request).__name__)
        return Done(), []

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        if self.dies.is_set():
            raise ServiceGone(f"{self.name}: its process is gone")

    async def notices(self) -> list[Notice]:
        await self.dies.wait()
        raise ServiceGone(f"{self.name}: its process is gone")


@asynccontextmanager
async def mortal(
    calls: list[str], prepare: Callable[[Endpoint], Awaitable[None]], limit: int = 1, stillborn: int = 0
) -> AsyncIterator[tuple[Mortal, ServiceSupervisor]]:
    """A generator that may die `limit` times, and its supervisor; `stillborn` successors die during their start."""
    services = {"generator": Mortal("generator", calls)}

    async def restart(name: str) -> Endpoint:
        calls.append("restart")
        if calls.count("restart") <= stillborn:
            raise ServiceError(f"{name}: died while starting")
        return Mortal(name, calls)

    def kill(name: str) -> None:
        calls.append("kill")
        services[name].dies.set()

    policy = RestartPolicy(trace(ppo), {"policy.generate#1": "generator"}, ["generator"], ["policy"], limit, 3600.0)
    supervisor = ServiceSupervisor(services, {}, policy, restart, kill, Liveness(10.0, lambda _: 10.0))
    async with asyncio.TaskGroup() as group:
        tasks = supervisor.follow(group)
        tasks.append(group.create_task(prepare_successors(supervisor, calls, prepare)))
        yield services["generator"], supervisor
        for task in tasks:
            task.cancel()


async def test_what_a_dead_service_could_not_answer_is_asked_of_its_successor_once_that_has_what_it_needs():
    calls: list[str] = []

    async def prepare(successor: Endpoint) -> None:
        calls.append(f"{successor.name} is prepared")

    async with mortal(calls, prepare) as (first, supervisor):
        first.dies.set()
        async with asyncio.timeout(60):
            await ask(supervisor.with_retry("generator"), GetStatistics())
    assert calls == ["restart", "EndPrompts", "generator replaced", "generator is prepared", "GetStatistics"]


async def test_a_successor_that_dies_while_it_is_equipped_has_one_too_or_ends_the_run():
    calls: list[str] = []

    async def prepare(successor: Endpoint) -> None:
        assert isinstance(successor, Mortal)
        successor.dies.set()
        await ask(successor, GetStatistics())

    with pytest.raises(ExceptionGroup) as ended:
        async with mortal(calls, prepare) as (first, supervisor):
            first.dies.set()
            async with asyncio.timeout(60):
                await ask(supervisor.with_retry("generator"), GetStatistics())
    assert ended.group_contains(ServiceGone, match=r"generator died 2 times .* failures.restarts = 1 allows"), (
        "it may die once"
    )
    assert calls == ["restart", "EndPrompts", "generator replaced"]


async def test_a_successor_that_dies_while_it_starts_counts_as_a_death():
    calls: list[str] = []
    async with mortal(calls, nothing, limit=3, stillborn=2) as (first, supervisor):
        first.dies.set()
        async with asyncio.timeout(60):
            await ask(supervisor.with_retry("generator"), GetStatistics())
            await supervisor.wait_healthy()
    assert calls == ["restart"] * 3 + ["EndPrompts", "generator replaced", "GetStatistics"]
    assert supervisor.deaths["generator"] == 3
    with pytest.raises(ExceptionGroup) as ended:
        async with mortal([], nothing, limit=1, stillborn=1) as (first, supervisor):
            first.dies.set()
            async with asyncio.timeout(60):
                await ask(supervisor.with_retry("generator"), GetStatistics())
    assert ended.group_contains(ServiceError, match="died while starting")


async def test_a_service_that_is_stopped_is_named_alone_then_killed_and_replaced():
    """Its own last word would blame another service."""
    calls: list[str] = []
    async with mortal(calls, nothing) as (first, supervisor):
        first.stopped.set()
        supervisor.waits.note(Waiting("policy.generate#1", "credit", "reward.score#1", 1.0))
        supervisor.waits.note(Waiting("reward.score#1", "rows", "policy.generate#1", 1.0))
        async with asyncio.timeout(60):
            while not supervisor.silences.current:
                await asyncio.sleep(0)
                assert [s for s in supervisor.silences.elapse(2.0) if s.ended] == []
            assert [line.partition(" since")[0] for line in supervisor.graph()] == [
                "generator has not answered for 6 s",
                "reward.score#1 waits for rows on policy.generate#1",
            ]
            assert supervisor.current_waits() == {
                "controller": "an answer on generator",
                "reward.score#1": "rows on policy.generate#1",
            }
            told = [silent for _ in range(5) for silent in supervisor.silences.elapse(2.0)]
            await ask(supervisor.with_retry("generator"), GetStatistics())
    assert told == [ServiceSilent(service="generator", seconds=10.0, ended=True)]
    assert calls == ["kill", "restart", "EndPrompts", "generator replaced", "GetStatistics"]


async def test_rows_for_a_service_that_is_being_replaced_are_left_to_who_prepares_it():
    async with mortal([], nothing) as (first, supervisor):
        first.dies.set()
        await supervisor.deliver("generator", Delivery("an edge", 0, []), [])
