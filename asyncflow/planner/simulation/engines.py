"""Generation in virtual time: engines generate in turns of several tokens and load weights between two turns.

The engines of a separate generator run independently. Where the policy generates, its ranks generate together, under
one lease, until no sequence is running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from asyncflow.planner.costs.speeds import Speed
from asyncflow.planner.simulation.simulated import SampleLengths, SimulatedWorld
from asyncflow.planner.simulation.virtual_clock import Signal, wait_for


class GeneratedSample(NamedTuple):
    """A finished sample, with the oldest weight version that generated one of its tokens."""

    sample: int
    version: int


class Generator:
    """The generating service: a separate generator, or the policy itself."""

    def __init__(
        self, world: SimulatedWorld, service: str, separate: bool, done: Callable[[Sequence[GeneratedSample]], None]
    ) -> None:
        """`done` is called with samples as they finish."""
        self._world, self._service, self._done = world, service, done
        self._speed = world.speed(service)
        loops = self._speed.engines if separate and not world.shares(service) else 1
        self._each = self._speed.engines // loops  # engines that share one loop
        self._versions = [-1] * loops  # of the loaded weights, by loop
        self._loads: list[deque[tuple[int, Signal]]] = [deque() for _ in range(loops)]
        self._waiting: deque[tuple[int, int]] = deque()  # (sample, min_version), in order of min_version
        self._running = 0
        self._wake = Signal(world.clock)

    def submit(self, samples: Sequence[int], min_version: int) -> None:
        """Queue samples; they are generated with weights of version `min_version` or newer."""
        self._waiting += [(sample, min_version) for sample in samples]
        self._wake.send()

    def load(self, version: int) -> Signal:
        """Load weights between two turns; the signal is sent when the first engine has them."""
        loaded = Signal(self._world.clock)
        for loads in self._loads:
            loads.append((version, loaded))
        self._wake.send()
        return loaded

    def follow(self, version: int) -> None:
        """The policy generates itself: its engines have the version that it trained last."""
        self._versions[0] = version
        self._wake.send()

    async def run(self) -> None:
        """Generate until the simulation ends."""
        await self._world.clock.all(self._loop(number) for number in range(len(self._loads)))

    async def _loop(self, number: int) -> None:
        """Load pending weights, then generate; each lease covers one firing."""
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
            with self._world.thread(self._service) as turn:
                await wait_for(turn)
                await self._world.work(self._service, "switch", self._speed.switch_s)
                await self._world.clock.all(self._engine(number) for _ in range(self._each))

    async def _generate(self, seconds: float, number: int) -> None:
        share = 1 / self._speed.engines
        if self._each == 1:
            await self._world.compute(self._service, "generate", seconds, number, share)
        else:  # the caller holds the service's thread
            await self._world.work(self._service, "generate", seconds, share)

    async def _engine(self, number: int) -> None:
        """Step one engine until no sequence runs. On devices of its own it refills slots as they become free."""
        whole = self._world.scenario.whole_batches
        goes_on = self._each == 1 and not self._world.shares(self._service)
        batch = RunningSequences(self._speed)
        self._fill(batch, number)
        while batch.running:
            finished, seconds = batch.whole() if whole else batch.turn(self._world.scenario.turn_tokens)
            await self._generate(seconds, number)
            if finished:
                self._running -= len(finished)
                self._done(finished)
            if self._each == 1:
                await self._install(number)
            if goes_on or not batch.running:
                self._fill(batch, number)

    def _fill(self, batch: RunningSequences, number: int) -> None:
        """Start waiting samples in free slots, spread evenly over the engines, if the weights are new enough."""
        level = -(-(self._running + len(self._waiting)) // self._speed.engines)
        most = min(self._speed.slots, level)
        while batch.running < most and self._ready(number):
            sample, _ = self._waiting.popleft()
            batch.add(sample, self._world.rows[sample], self._versions[number])
            self._running += 1


class RunningSequences:
    """The running sequences of one engine, and the progress of each."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._generated = 0  # tokens that a sequence running since the start would have
        self._ends: list[tuple[int, int]] = []  # (`_generated` at its end, sample)
        self._context = 0  # sum over the running sequences, in tokens
        self._new: list[int] = []  # lengths of prompts to prefill
        self._began: dict[int, tuple[int, int]] = {}  # sample -> (its total tokens, the version at its start)

    @property
    def running(self) -> int:
        return len(self._ends)

    def add(self, sample: int, row: SampleLengths, version: int) -> None:
        """Start a sequence."""
        heappush(self._ends, (self._generated + row.response, sample))
        self._began[sample] = row.length, version
        self._context += row.prompt
        self._new.append(row.prompt)

    def turn(self, tokens: int) -> tuple[list[GeneratedSample], float]:
        """Generate up to `tokens` tokens, or until a sequence ends; return the finished samples and the seconds."""
        generated = min(tokens, self._ends[0][0] - self._generated)
        seconds = self._prefill() + self._decode(generated)
        return self._finished(), seconds

    def whole(self) -> tuple[list[GeneratedSample], float]:
        """Generate until every sequence has ended; all finish together."""
        seconds, finished = self._prefill(), list[GeneratedSample]()
        while self._ends:
            seconds += self._decode(self._ends[0][0] - self._generated)
            finished += self._finished()
        return finished, seconds

    def _prefill(self) -> float:
        prompts, self._new = self._new, []
        return self._speed.prefill_s(prompts) if prompts else 0.0

    def _decode(self, tokens: int) -> float:
        running = len(self._ends)
        context = self._context / running + tokens / 2
        self._generated += tokens
        self._context += running * tokens
        return tokens * self._speed.decode_s(running, context)

    def _finished(self) -> list[GeneratedSample]:
        finished: list[GeneratedSample] = []
        while self._ends and self._ends[0][0] <= self._generated:
            sample = heappop(self._ends)[1]
            length, version = self._began.pop(sample)
            self._context -= length
            finished.append(GeneratedSample(sample, version))
        return finished
