"""Services in virtual time: mailboxes, firings and leases as in the run, work as long as its `Speed` says.

The bookkeeping is the run's own code: RowTable and `has_room` for mailboxes, PoolLease for turns. What a real
service computes is here a stretch of time on its devices.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from asyncflow.control.device_lease import Claim, PoolLease, shared_leases
from asyncflow.dataflow.graph import Stage
from asyncflow.planner.costs.speeds import Speed
from asyncflow.planner.simulation.scenario import Scenario
from asyncflow.planner.simulation.virtual_clock import Clock, Cores, Lock, Signal
from asyncflow.services.channels.mailbox import has_room
from asyncflow.services.channels.row_table import RowTable

Send = Callable[[Stage, Sequence[int]], Awaitable[None]]


class SampleLengths(msgspec.Struct, frozen=True):
    """A sample's lengths in tokens."""

    prompt: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.response


class SimulatedWorld:
    """What all simulated services share."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.cores = Cores(self.clock, scenario.cores, scenario.crowded)
        self.rows: dict[int, SampleLengths] = {}
        self.busy = BusyTime(self.clock, scenario.pools)
        self._threads: dict[tuple[str, int], Lock] = {}
        self._leases = shared_leases({s: p for s, p in scenario.pools.items() if p})
        self._tickets = itertools.count()
        self._grants: dict[int, Signal] = {}

    def speed(self, service: str) -> Speed:
        """How fast a service works."""
        return self.scenario.speeds[service]

    async def call(self) -> None:
        """Rows or a request travel to a service: work of nobody's devices."""
        await self.cores.work(self.scenario.call_s)

    async def compute(self, service: str, method: str, seconds: float, thread: int = 0, share: float = 1.0) -> None:
        """Work in one of a service's compute threads; engines apart have one each, all else shares the first."""
        async with self.thread(service, thread):
            await self.work(service, method, seconds, share)

    def thread(self, service: str, number: int = 0) -> Lock:
        """A compute thread of a service."""
        return self._threads.setdefault((service, number), Lock(self.clock))

    async def work(self, service: str, method: str, seconds: float, share: float = 1.0) -> None:
        """Work of a share of a service's devices, on the machine's cores where they are shared."""
        self.busy.add(service, share)
        await self.clock.sleep(self.scenario.delays.get(service, {}).get(method, 0.0))
        await self.cores.work(seconds)
        self.busy.add(service, -share)

    def shares(self, service: str) -> bool:
        """Whether other services take turns with it."""
        return service in self._leases

    def lease(self, service: str, stage: str) -> LeaseTurn:
        """The pool's devices, in calling order; free of charge where nobody shares them."""
        return LeaseTurn(self, self._leases.get(service), Claim(service, next(self._tickets), stage))

    def wait_for(self, ticket: int) -> Signal:
        """What tells a claim that it is its turn."""
        return self._grants.setdefault(ticket, Signal(self.clock))

    def grant(self, claim: Claim | None) -> None:
        """Tell whose turn it is."""
        if claim is not None:
            self.wait_for(claim.ticket).send()

    def over(self, ticket: int) -> None:
        """A claim has ended."""
        self._grants.pop(ticket, None)


class LeaseTurn:
    """One claim on a pool, held inside of `async with`."""

    def __init__(self, world: SimulatedWorld, lease: PoolLease | None, claim: Claim) -> None:
        self._world, self._lease, self._claim = world, lease, claim

    async def __aenter__(self) -> None:
        if self._lease is None:
            return
        await self._world.call()
        granted = self._world.wait_for(self._claim.ticket)
        if self._lease.ask(self._claim) != self._claim:
            await granted.wait()

    async def __aexit__(self, *error: object) -> None:
        if self._lease is not None:
            self._world.over(self._claim.ticket)
            self._world.grant(self._lease.give_back(self._claim.service, self._claim.ticket))


class BusyTime:
    """Seconds in which services, and pools of them, were at work; an engine of several is a part of its service."""

    def __init__(self, clock: Clock, pools: Mapping[str, str]) -> None:
        self._clock = clock
        self._names = {s: (s, f"pool {pool}") if pool else (s,) for s, pool in pools.items()}
        self._level: defaultdict[str, float] = defaultdict(float)
        self._since: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by service, and by "pool NAME"

    def add(self, service: str, share: float) -> None:
        """A share of a service starts to work, or (negative) is done."""
        for name in self._names[service]:
            self._count(name)
            self._level[name] += share

    def until_now(self) -> dict[str, float]:
        """The seconds so far, also of what is at work."""
        for name in self._level:
            self._count(name)
        return dict(self.seconds)

    def _count(self, name: str) -> None:
        self.seconds[name] += (self._clock.now - self._since[name]) * min(1.0, self._level[name])
        self._since[name] = self._clock.now


class Inbox:
    """A stage's mailbox: one edge gives credit, a join never refuses."""

    def __init__(self, clock: Clock, edges: int, capacity: int) -> None:
        self._table: RowTable[None] = RowTable(edges)
        self._capacity = capacity if edges == 1 else 0
        self._changed = Signal(clock)

    async def put(self, position: int, samples: Sequence[int]) -> None:
        """Hand rows in; returns when there was room for them."""
        while self._capacity and not has_room(len(self._table), len(samples), self._capacity):
            await self._changed.wait()
        self._table.arrive(position, [(sample, None) for sample in samples])
        self._changed.send()

    async def take(self, most: int) -> list[int]:
        """Whatever is settled, up to `most` rows."""
        while not self._table.settled:
            await self._changed.wait()
        samples = self._table.next_settled(most)
        self._table.take(samples)
        self._changed.send()
        return samples

    def end(self, prompts: Sequence[int]) -> None:
        """These prompts are over."""
        self._table.end(prompts)


class SimulatedRowStage:
    """log_probs, values, score: rows in, rows out."""

    def __init__(self, world: SimulatedWorld, stage: Stage, service: str, send: Send) -> None:
        scenario = world.scenario
        self._world, self._stage, self._service, self._send = world, stage, service, send
        self.inbox = Inbox(world.clock, len(stage.inputs), scenario.mailbox_rows or scenario.samples_per_step)

    async def run(self) -> None:
        """Fire for ever, on whatever is there."""
        world, service = self._world, self._service
        while True:
            samples = await self.inbox.take(world.scenario.firing_rows)
            seconds = world.speed(service).forward_s([world.rows[s].length for s in samples])
            async with world.lease(service, self._stage.name):
                await world.compute(service, self._stage.method, seconds)
            await self._send(self._stage, samples)
