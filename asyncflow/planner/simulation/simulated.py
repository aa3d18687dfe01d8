"""Services in virtual time: mailboxes, firings and leases as in a run, with durations from `Speed`.

The bookkeeping is the code of a real run: RowTable and `has_room` for mailboxes, PoolLease for shared devices. Where a
real service computes, a simulated one occupies its devices for some time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
import simpy
from simpy.resources.resource import Request

from asyncflow.control.device_lease import Claim, PoolLease, shared_leases
from asyncflow.dataflow.graph import Stage
from asyncflow.planner.costs.speeds import Speed
from asyncflow.planner.simulation.scenario import Scenario
from asyncflow.planner.simulation.virtual_clock import Clock, Cores, Signal, wait_for
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
    """State that all simulated services share: clock, cores, leases, sample lengths, busy times."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.cores = Cores(self.clock, scenario.cores, scenario.crowded)
        self.rows: dict[int, SampleLengths] = {}
        self.busy = BusyTime(self.clock, scenario.pools)
        self._threads: defaultdict[tuple[str, int], simpy.Resource] = defaultdict(lambda: simpy.Resource(self.clock))
        self._leases = shared_leases({s: p for s, p in scenario.pools.items() if p})
        self._tickets = itertools.count()
        self.grants: dict[int, Signal] = {}  # ticket of a claim -> sent when the claim is granted

    def speed(self, service: str) -> Speed:
        """The speed of a service."""
        return self.scenario.speeds[service]

    async def call(self) -> None:
        """The overhead of sending rows or a request to a service; it occupies no device."""
        await self.cores.work(self.scenario.call_s)

    async def compute(self, service: str, method: str, seconds: float, thread: int = 0, share: float = 1.0) -> None:
        """Work in a compute thread of a service: thread 0, or one per engine of a separate generator."""
        with self.thread(service, thread) as turn:
            await wait_for(turn)
            await self.work(service, method, seconds, share)

    def thread(self, service: str, number: int = 0) -> Request:
        """A request for a compute thread of a service, to wait for inside `with`; first come, first served."""
        return self._threads[service, number].request()

    async def work(self, service: str, method: str, seconds: float, share: float = 1.0) -> None:
        """Occupy a share of a service's devices, and the machine's cores if devices share them."""
        self.busy.add(service, share)
        await self.clock.sleep(self.scenario.delays.get(service, {}).get(method, 0.0))
        await self.cores.work(seconds)
        self.busy.add(service, -share)

    def shares(self, service: str) -> bool:
        """Whether other services use the same devices."""
        return service in self._leases

    def lease(self, service: str, stage: str) -> LeaseTurn:
        """A turn on the pool's devices, in the order of calls; costs nothing if they are not shared."""
        return LeaseTurn(self, self._leases.get(service), Claim(service, next(self._tickets), stage))


class LeaseTurn:
    """One claim on a pool, held inside `async with`."""

    def __init__(self, world: SimulatedWorld, lease: PoolLease | None, claim: Claim) -> None:
        self._world, self._lease, self._claim = world, lease, claim

    async def __aenter__(self) -> None:
        if self._lease is None:
            return
        await self._world.call()
        granted = self._world.grants[self._claim.ticket] = Signal(self._world.clock)
        if self._lease.ask(self._claim) != self._claim:
            await granted.wait()

    async def __aexit__(self, *error: object) -> None:
        if self._lease is None:
            return
        del self._world.grants[self._claim.ticket]
        if following := self._lease.give_back(self._claim.service, self._claim.ticket):
            self._world.grants[following.ticket].send()


class BusyTime:
    """Busy seconds of services and of pools; one of n engines counts as 1/n of its service."""

    def __init__(self, clock: Clock, pools: Mapping[str, str]) -> None:
        self._clock = clock
        self._names = {s: (s, f"pool {pool}") if pool else (s,) for s, pool in pools.items()}
        self._level: defaultdict[str, float] = defaultdict(float)
        self._since: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by service, and by "pool NAME"

    def add(self, service: str, share: float) -> None:
        """A share of a service starts to work (positive) or stops (negative)."""
        for name in self._names[service]:
            self._count(name)
            self._level[name] += share

    def until_now(self) -> dict[str, float]:
        """Busy seconds up to now, including work in progress."""
        for name in self._level:
            self._count(name)
        return dict(self.seconds)

    def _count(self, name: str) -> None:
        self.seconds[name] += (self._clock.now - self._since[name]) * min(1.0, self._level[name])
        self._since[name] = self._clock.now


class Inbox:
    """A stage's mailbox: bounded with one input edge; a join of several is unbounded."""

    def __init__(self, clock: Clock, edges: int, capacity: int) -> None:
        self._table: RowTable[None] = RowTable(edges)
        self._capacity = capacity if edges == 1 else 0
        self._changed = Signal(clock)

    async def put(self, position: int, samples: Sequence[int]) -> None:
        """Add rows; waits until there is room for them."""
        while self._capacity and not has_room(len(self._table), len(samples), self._capacity):
            await self._changed.wait()
        self._table.arrive(position, [(sample, None) for sample in samples])
        self._changed.send()

    async def take(self, most: int) -> list[int]:
        """Take up to `most` rows that have arrived on every edge; waits for at least one."""
        while not self._table.complete:
            await self._changed.wait()
        samples = self._table.next_complete(most)
        self._table.take(samples)
        self._changed.send()
        return samples

    def end(self, prompts: Sequence[int]) -> None:
        """Forget the rows of these finished prompts."""
        self._table.end(prompts)


class SimulatedRowStage:
    """A stage that maps rows to rows: log_probs, values, score."""

    def __init__(self, world: SimulatedWorld, stage: Stage, service: str, send: Send) -> None:
        scenario = world.scenario
        self._world, self._stage, self._service, self._send = world, stage, service, send
        self.inbox = Inbox(world.clock, len(stage.inputs), scenario.mailbox_rows or scenario.samples_per_step)

    async def run(self) -> None:
        """Fire on available rows until the simulation ends."""
        world, service = self._world, self._service
        while True:
            samples = await self.inbox.take(world.scenario.firing_rows)
            seconds = world.speed(service).forward_s([world.rows[s].length for s in samples])
            async with world.lease(service, self._stage.name):
                await world.compute(service, self._stage.method, seconds)
            await self._send(self._stage, samples)
