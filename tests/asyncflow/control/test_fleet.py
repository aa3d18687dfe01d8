"""Who has a pool's devices next gets them when who had them last has made room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from asyncflow.control.fleet import Fleet
from asyncflow.control.supervision import Supervisor
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.trace import trace
from asyncflow.services.endpoint import Endpoint, Payload
from protocols.delivery import Delivery
from protocols.notices import LeaseAsked, LeaseReturned, Notice, Waiting
from protocols.requests import Done, Grant, Reply, Request, YieldDevices


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
    """Policy and reference on one pool, followed by their controller's fleet."""
    async with followed(book, moves) as (services, _):
        yield services


@asynccontextmanager
async def followed(book: list[str], moves: float) -> AsyncIterator[tuple[dict[str, Sharing], Fleet]]:
    """The same, and the fleet."""

    async def restart(name: str) -> Endpoint:
        raise NotImplementedError

    async def hear(notice: Notice) -> None:
        raise NotImplementedError

    services = {name: Sharing(name, book, moves) for name in ("policy", "reference")}
    fleet = Fleet(services, dict.fromkeys(services, "main"), Supervisor(trace(ppo), {}, [], 0), restart)
    async with asyncio.TaskGroup() as group:
        tasks = fleet.follow(group, hear, lambda event: None)
        yield services, fleet
        for task in tasks:
            task.cancel()


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
    async with followed(book, moves=1.0) as (services, fleet):
        await have_turns(services, book, "policy")
        services["policy"].may_leave.clear()
        waiting = Waiting("reference", "lease", "main")
        services["reference"].heard.put_nowait(waiting)
        services["reference"].heard.put_nowait(LeaseAsked(7, "reference"))
        async with asyncio.timeout(5):
            while "policy leaves" not in book:
                await asyncio.sleep(0)
            assert [line.partition(" since")[0] for line in fleet.graph()] == [
                "reference waits for free devices on policy"
            ]
            services["policy"].may_leave.set()
            while "reference works" not in book:
                await asyncio.sleep(0)
        assert fleet.graph() == []
