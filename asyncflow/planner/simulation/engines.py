"""Generation in virtual time: engines that draw rows turn by turn, and take weights between two turns.

A generator apart has engines that go on by themselves; the policy's own ranks draw together, under one lease, until
nothing runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from asyncflow.planner.costs.speeds import Speed
from asyncflow.planner.simulation.simulated import SampleLengths, SimulatedWorld
from asyncflow.planner.simulation.virtual_clock import Signal


class GeneratedSample(NamedTuple):
    """A finished sample, and the oldest version of weights that drew a token of it."""

    sample: int
    version: int


class Generator:
    """A service that generates."""

    def __init__(
        self, world: SimulatedWorld, service: str, apart: bool, done: Callable[[Sequence[GeneratedSample]], None]
    ) -> None:
        """`done` gets samples as they finish."""
        self._world, self._service, self._done = world, service, done
        self._speed = world.speed(service)
        loops = self._speed.engines if apart and not world.shares(service) else 1
        self._each = self._speed.engines // loops  # engines that draw together
        self._versions = [-1] * loops  # of the installed weights
        self._loads: list[deque[tuple[int, Signal]]] = [deque() for _ in range(loops)]
        self._waiting: deque[tuple[int, int]] = deque()  # (sample, min_version), never falling
        self._running = 0
        self._wake = Signal(world.clock)

    def submit(self, samples: Sequence[int], min_version: int) -> None:
        """Queue rows; they are drawn with weights of version `min_version` or newer."""
        self._waiting += [(sample, min_version) for sample in samples]
        self._wake.send()

    def load(self, version: int) -> Signal:
        """Install weights between two turns; the signal tells when the first engine has them."""
        loaded = Signal(self._world.clock)
        for loads in self._loads:
            loads.append((version, loaded))
        self._wake.send()
        return loaded

    def follow(self, version: int) -> None:
        """The policy's own engines draw with whatever was trained last."""
        self._versions[0] = version
        self._wake.send()

    async def run(self) -> None:
        """Generate for ever."""
        await self._world.clock.all(self._loop(number) for number in range(len(self._loads)))

    async def _loop(self, number: int) -> None:
        """Loads first, then rows, one firing a lease."""
        while True:
            while not self._loads[number] and not self._ready(number):
                await self._wake.wait()
            async with self._world.lease(self._service, "generate"):
                await self._install(number)
                if self._ready(number):
                    await self._fire(number)

    def _ready(self, number: int) -> bool:
        return bool(self._waiting) and self._waiting[0][1] <= self._versions[number]

    async def _install(self, number: int) -> None:
        while self._loads[number]:
            version, loaded = self._loads[number].popleft()
            await self._world.compute(self._service, "load", self._speed.publish_s, number, 1 / len(self._loads))
            self._versions[number] = version
            loaded.send()

    async def _fire(self, number: int) -> None:
        if self._each == 1:
            await self._engine(number)
        else:
            async with self._world.thread(self._service):
                await self._world.work(self._service, "switch", self._speed.switch_s)
                await self._world.clock.all(self._engine(number) for _ in range(self._each))

    async def _draw(self, seconds: float, number: int) -> None:
        share = 1 / self._speed.engines
        if self._each == 1:
            await self._world.compute(self._service, "generate", seconds, number, share)
        else:  # the service's thread is theirs already
            await self._world.work(self._service, "generate", seconds, share)

    async def _engine(self, number: int) -> None:
        """One engine steps until nothing runs; alone on its devices it takes further rows in as slots fall free."""
        whole = self._world.scenario.whole_batches
        goes_on = self._each == 1 and not self._world.shares(self._service)
        batch = RunningSequences(self._speed)
        self._fill(batch, number)
        while batch.running:
            finished, seconds = batch.whole() if whole else batch.turn(self._world.scenario.turn_tokens)
            await self._draw(seconds, number)
            if finished:
                self._running -= len(finished)
                self._done(finished)
            if self._each == 1:
                await self._install(number)
            if goes_on or not batch.running:
                self._fill(batch, number)

    def _fill(self, batch: RunningSequences, number: int) -> None:
        """Rows take slots, shared evenly among the engines, as far as the weights are new enough."""
        level = -(-(self._running + len(self._waiting)) // self._speed.engines)
        most = min(self._speed.slots, level)
        while batch.running < most and self._ready(number):
            sample, _ = self._waiting.popleft()
            batch.add(sample, self._world.rows[sample], self._versions[number])
            self._running += 1


class RunningSequences:
    """The sequences that one engine runs, and how far each has come."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._drawn = 0  # tokens since the engine began, of a sequence that was there from the start
        self._ends: list[tuple[int, int]] = []  # (drawn at its end, sample)
        self._context = 0  # tokens behind all running sequences
        self._new: list[int] = []  # prompts to be read
        self._began: dict[int, tuple[int, int]] = {}  # sample -> its tokens in all, and the version it began with

    @property
    def running(self) -> int:
        return len(self._ends)

    def add(self, sample: int, row: SampleLengths, version: int) -> None:
        """A sequence begins."""
        heappush(self._ends, (self._drawn + row.response, sample))
        self._began[sample] = row.length, version
        self._context += row.prompt
        self._new.append(row.prompt)

    def turn(self, tokens: int) -> tuple[list[GeneratedSample], float]:
        """Up to so many tokens, or until a sequence ends: those that ended, and the seconds."""
        drawn = min(tokens, self._ends[0][0] - self._drawn)
        seconds = self._read() + self._draw(drawn)
        return self._finished(), seconds

    def whole(self) -> tuple[list[GeneratedSample], float]:
        """All sequences to their ends; they leave together."""
        seconds, finished = self._read(), list[GeneratedSample]()
        while self._ends:
            seconds += self._draw(self._ends[0][0] - self._drawn)
            finished += self._finished()
        return finished, seconds

    def _read(self) -> float:
        prompts, self._new = self._new, []
        return self._speed.prefill_s(prompts) if prompts else 0.0

    def _draw(self, tokens: int) -> float:
        running = len(self._ends)
        context = self._context / running + tokens / 2
        self._drawn += tokens
        self._context += running * tokens
        return tokens * self._speed.decode_s(running, context)

    def _finished(self) -> list[GeneratedSample]:
        finished: list[GeneratedSample] = []
        while self._ends and self._ends[0][0] <= self._drawn:
            sample = heappop(self._ends)[1]
            length, version = self._began.pop(sample)
            self._context -= length
            finished.append(GeneratedSample(sample, version))
        return finished
