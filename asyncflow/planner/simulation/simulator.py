"""Simulate a run in virtual time, to predict its step time, idle devices and staleness.

    admit --> generate --> ... --> join --> batcher --> advantages --> updates --> publish --> commit

Admission, staleness, order and waiting are decided by the InFlightPrompts of a real run, turns on shared devices by its
PoolLease. Lengths are sampled, so long tails appear as stragglers and idle engines. Only durations are simulated.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import msgspec

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.staleness import Admission, CompletePrompt, check_age
from asyncflow.dataflow.graph import SOURCE, Stage
from asyncflow.planner.costs.devices import Refused
from asyncflow.planner.simulation.engines import GeneratedSample, Generator
from asyncflow.planner.simulation.scenario import Scenario
from asyncflow.planner.simulation.simulated import SampleLengths, SimulatedRowStage, SimulatedWorld
from asyncflow.planner.simulation.virtual_clock import Signal
from protocols.control.notices import PromptSettled
from protocols.data.ids import BASELINE_INDEX, prompt_of, sample_id
from protocols.data.messages import Values


class SimulatedRun(msgspec.Struct, frozen=True):
    """The result of a simulation. Shares and means are over the steady steps."""

    step_s: float  # mean
    steps_s: tuple[float, ...]  # of every step, not only the steady ones
    pool_idle: dict[str, float]  # share of the time in which no service of the pool was busy
    busy_s: dict[str, float]  # service -> busy seconds a step
    batch_wait_s: float  # seconds a step that training waited for a batch
    staleness: dict[int, float]  # versions -> share of the trained prompts
    wall_s: float  # real seconds that the simulation took


def simulate(scenario: Scenario) -> SimulatedRun:
    """Simulate all steps of a scenario.

    Raises Refused if the simulation deadlocks before the last step, as the run would.
    """
    started = time.perf_counter()
    run = _Run(scenario)
    run.world.clock.run()
    if len(run.commits) < scenario.pace.steps:
        raise Refused(f"the simulated run stops after {len(run.commits)} of {scenario.pace.steps} steps")
    return run.outcome(scenario.steady, time.perf_counter() - started)


class _Commit(msgspec.Struct, frozen=True):
    """The end of a step."""

    at: float
    busy: dict[str, float]
    waited: float
    ages: list[int]


class _Run:
    """One simulated run: the controller and its services."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.world = scenario, SimulatedWorld(scenario)
        self.commits: list[_Commit] = []
        pace, flow, clock = scenario.pace, scenario.dataflow, self.world.clock
        self._rng = random.Random(scenario.seed)
        self._inflight = InFlightPrompts(Admission(pace.prompts_per_step, pace.staleness, pace.steps), pace.max_refills)
        self._changed = Signal(clock)
        self._cursor = 0
        sources = [stage for stage in flow.stages if stage.generates]
        self._generating_service = scenario.services[sources[0].name]
        self._separate = self._generating_service != "policy"
        self._outgoing: dict[str, list[int]] = {stage.name: [] for stage in sources}
        self._outgoing_changed = {stage.name: Signal(clock) for stage in sources}
        self._generator = Generator(self.world, self._generating_service, self._separate, self._generated)
        rows = [s for s in flow.stages if not (s.generates or s.closes or s.is_sink)]
        self._rows = {s.name: SimulatedRowStage(self.world, s, scenario.services[s.name], self._send) for s in rows}
        self._awaited: dict[int, int] = {}  # prompt -> rows that have not reached the join
        self._per_prompt = sum(
            1 if channel.grain == "prompt" else pace.samples_per_prompt
            for channel in flow.inputs_of(flow.batch_stage.name)
        )
        self._min_versions: dict[int, int] = {}  # live prompt -> version at its admission
        self._incomplete: Counter[int] = Counter()  # version at admission -> prompts that wait for rows
        self._oldest: dict[int, int] = {}  # prompt -> oldest version that generated or valued a row of it
        self._updates: Counter[str] = Counter()  # service -> number of updates
        for stage in sources:
            clock.start(self._forward(stage))
        for row_stage in self._rows.values():
            clock.start(row_stage.run())
        clock.start(self._generator.run())
        clock.start(self._drive())

    # --- the controller

    async def _drive(self) -> None:
        await self._publish(0)
        self.world.clock.start(self._admit())
        for step in range(self.scenario.pace.steps):
            began = self.world.clock.now
            batch = await self._form()
            waited = self.world.clock.now - began
            ages = check_age(batch, step, self.scenario.pace.staleness)
            await self._train(batch, step)
            await self.world.clock.sleep(self.scenario.record_s)
            self._inflight.commit(batch)
            for prompt in self._inflight.take_finished():
                self._forget(prompt)
            self.commits.append(_Commit(self.world.clock.now, self.world.busy.until_now(), waited, ages))
            self._changed.send()

    async def _admit(self) -> None:
        admission = self._inflight.admission
        while True:
            while not (room := admission.room()):
                await self._changed.wait()
            prompts = list(range(self._cursor, self._cursor + room))
            self._cursor += room
            self._inflight.admit(prompts)
            self._awaited |= dict.fromkeys(prompts, self._per_prompt)
            self._min_versions |= dict.fromkeys(prompts, admission.version)
            self._incomplete[admission.version] += room
            await self._hand_out(prompts, admission.version)

    async def _hand_out(self, prompts: Sequence[int], min_version: int) -> None:
        for channel in self.scenario.dataflow.consumers(SOURCE):
            greedy = self.scenario.dataflow.stage(channel.destination).greedy
            indices = [BASELINE_INDEX] if greedy else range(self.scenario.pace.samples_per_prompt)
            samples = [sample_id(prompt, index) for prompt in prompts for index in indices]
            for sample in samples:
                self.world.rows[sample] = self._random_lengths()
            await self.world.call()
            self._generator.submit(samples, min_version)

    def _random_lengths(self) -> SampleLengths:
        scenario, rng = self.scenario, self._rng
        return SampleLengths(round(rng.choice(scenario.prompt.tokens)), round(rng.choice(scenario.response.tokens)))

    async def _form(self) -> list[CompletePrompt]:
        while True:
            if self._may_form() and (batch := self._inflight.choose()) is not None:
                return batch
            await self._changed.wait()

    def _may_form(self) -> bool:
        """A cheap check before `choose`, which looks at every prompt: false only if `choose` would return None."""
        pace, step = self.scenario.pace, len(self.commits)
        due = [
            sum(n for min_version, n in self._incomplete.items() if min_version <= step + j - pace.staleness)
            for j in range(2)
        ]
        return self._inflight.ready >= pace.prompts_per_step and not due[0] and due[1] <= pace.prompts_per_step

    async def _train(self, batch: list[CompletePrompt], step: int) -> None:
        """Compute advantages, then run every trainer; weights may be published before the critics have finished."""
        world, closing = self.world, self.scenario.dataflow.batch_stage
        samples = [s for prompt in self._inflight.notices_of(batch) for s in prompt.alive]
        lengths = [world.rows[sample].length for sample in samples]
        await world.call()
        await world.compute(closing.service, closing.method, world.speed(closing.service).forward_s(lengths))
        sinks = self.scenario.dataflow.sinks
        policy = [self._update(s, lengths) for s in sinks if s.service == "policy"]
        others = [self._update(s, lengths) for s in sinks if s.service != "policy"]

        async def policy_then_publish() -> None:
            await world.clock.all(policy)
            await self._publish(step + 1)

        await world.clock.all([policy_then_publish(), *others])

    async def _update(self, stage: Stage, lengths: Sequence[int]) -> None:
        world = self.world
        await world.call()
        async with world.lease(stage.service, stage.name):
            await world.compute(stage.service, stage.method, world.speed(stage.service).update_s(lengths))
        self._updates[stage.service] += 1

    async def _publish(self, version: int) -> None:
        if not self._separate:
            self._generator.follow(version)
            return
        await self.world.call()
        await self.world.compute("policy", "publish", self.world.speed("policy").publish_s)
        await self.world.call()
        await self._generator.load(version).wait()

    # --- rows between the stages

    def _generated(self, finished: Sequence[GeneratedSample]) -> None:
        for sample, version in finished:
            self._note(sample, version)
        for stage in (s for s in self.scenario.dataflow.stages if s.generates):
            mine = [d.sample for d in finished if (d.sample & BASELINE_INDEX == BASELINE_INDEX) == stage.greedy]
            if mine:
                self._outgoing[stage.name] += mine
                self._outgoing_changed[stage.name].send()

    def _note(self, sample: int, version: int) -> None:
        """Record the version that generated or valued a row; a prompt is as old as the oldest of its rows."""
        prompt = prompt_of(sample)
        self._oldest[prompt] = min(self._oldest.get(prompt, version), version)

    async def _forward(self, stage: Stage) -> None:
        """Send finished rows to the next stages; rows that finish during a send go out together with the next."""
        while True:
            while not self._outgoing[stage.name]:
                await self._outgoing_changed[stage.name].wait()
            gathered, self._outgoing[stage.name] = self._outgoing[stage.name], []
            await self._send(stage, gathered)

    async def _send(self, stage: Stage, samples: Sequence[int]) -> None:
        if stage.produces is Values:
            for sample in samples:
                self._note(sample, self._updates[stage.service])
        await self.world.call()
        for channel in self.scenario.dataflow.consumers(stage.name):
            if channel.destination in self._rows:
                await self._rows[channel.destination].inbox.put(channel.position, samples)
            else:
                self._join(samples)

    def _join(self, samples: Sequence[int]) -> None:
        """Rows arrive at the join before the batch; a prompt is complete with its last row."""
        for sample in samples:
            prompt = prompt_of(sample)
            self._awaited[prompt] -= 1
            if not self._awaited[prompt]:
                self._complete(prompt)
        self._changed.send()

    def _complete(self, prompt: int) -> None:
        self._incomplete[self._min_versions[prompt]] -= 1
        samples = [sample_id(prompt, index) for index in range(self.scenario.pace.samples_per_prompt)]
        trainable = self._rng.random() >= self.scenario.dropped
        self._inflight.complete(
            PromptSettled(prompt, samples, [], oldest_version=self._oldest[prompt], trainable=trainable)
        )
        if not trainable:
            for ended in self._inflight.take_finished():
                self._forget(ended)

    def _forget(self, prompt: int) -> None:
        """Drop the rows of a finished prompt."""
        for index in (*range(self.scenario.pace.samples_per_prompt), BASELINE_INDEX):
            self.world.rows.pop(sample_id(prompt, index), None)
        del self._awaited[prompt], self._min_versions[prompt], self._oldest[prompt]
        for row_stage in self._rows.values():
            row_stage.inbox.end([prompt])

    # --- the result

    def outcome(self, steady: range, wall_s: float) -> SimulatedRun:
        """The result over the steady steps."""
        times = [0.0, *(commit.at for commit in self.commits)]
        nothing = _Commit(0.0, {}, 0.0, [])
        first, last = ([nothing, *self.commits][moment] for moment in (steady.start, steady.stop))
        counted = self.commits[steady.start : steady.stop]
        seconds, steps = last.at - first.at, len(counted)
        busy = {name: spent - first.busy.get(name, 0.0) for name, spent in last.busy.items()}
        ages = Counter(age for commit in counted for age in commit.ages)
        prompts = sum(ages.values())
        return SimulatedRun(
            step_s=seconds / steps,
            steps_s=tuple(after - before for before, after in pairwise(times)),
            pool_idle={pool: 1 - busy.get(f"pool {pool}", 0.0) / seconds for pool in self.scenario.devices},
            busy_s={name: spent / steps for name, spent in busy.items() if not name.startswith("pool ")},
            batch_wait_s=fmean(commit.waited for commit in counted),
            staleness={age: count / prompts for age, count in sorted(ages.items())},
            wall_s=wall_s,
        )
