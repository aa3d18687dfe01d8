"""Invariants that are checked at every event. A `Violation` names the rule, the place and the numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from asyncflow.control.admission.staleness import Admission
from asyncflow.control.device_lease import PoolLease
from tests.asyncflow.simulation.turns import OpenLease

if TYPE_CHECKING:
    from tests.asyncflow.simulation.service import Part, Service
    from tests.asyncflow.simulation.world import World


class Violation(Exception):
    """A bound was exceeded, or a row was duplicated, mixed up or lost."""


class Deadlock(Exception):
    """The run is not finished and no event is possible."""


def nearer(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Of two (value, limit) the one with the higher ratio; with equal ratios the one with the larger limit."""
    return max(a, b, key=lambda pair: (pair[0] / max(pair[1], 1), pair[1]))


class Watch:
    """Checks every event, and records how near each bound was reached."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.counts: Counter[str] = Counter()
        self.nearest: dict[str, tuple[int, int]] = {}  # bound -> the (value, limit) with the highest ratio
        self._trained: defaultdict[int, dict[str, list[Any]]] = defaultdict(dict)  # step -> sink -> rows
        self.fates: set[tuple[int, str]] = set()  # (version, how a prompt ended then)
        self.ages: set[tuple[int, int]] = set()  # (step, age in versions of a prompt in its batch)
        self.seeds: dict[int, int] = {}  # by sample
        self.firings: defaultdict[str, list[str]] = defaultdict(list)  # by stage: the rows of each firing, in order
        self._grants: Counter[str] = Counter()  # by pool
        self._asked: dict[int, int] = {}  # ticket -> grants of its pool when it was claimed

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] += number

    def bound(self, what: str, where: str, value: int, limit: int) -> None:
        """Check that a value does not exceed its limit."""
        self.nearest[what] = nearer(self.nearest.get(what, (0, 1)), (value, limit))
        if value > limit:
            raise Violation(f"{what}: {value} at {where}, at most {limit}")

    # --- devices

    def asked(self, lease: PoolLease, ticket: int) -> None:
        self._asked[ticket] = self._grants[lease.pool]

    def passed_by(self, lease: PoolLease, ticket: int) -> int:
        """Grants of a pool since a claim was made."""
        return self._grants[lease.pool] - self._asked[ticket]

    def granted(self, lease: PoolLease, ticket: int) -> None:
        """First come, first served: a claim waits for at most as many grants as stages and engines share the pool."""
        self._grants[lease.pool] += 1
        between = self.passed_by(lease, ticket) - 1
        del self._asked[ticket]
        if isinstance(lease, OpenLease):
            return
        sharers = sum(len(s.parts) for s in self._world.services.values() if s.lease is lease)
        self.bound("grants before one's own", lease.pool, between, sharers)

    def nothing_held(self, service: Service, part: Part) -> None:
        """No part waits for credit while it holds devices."""
        if self._world.rules.kept_while_sending == "nothing" and (service.holds_lease(part) or service.thread is part):
            raise Violation(f"{part.name} waits for credit and holds the devices of {service.name}")

    # --- versions

    def budget(self, admission: Admission, live: int) -> None:
        """N_r = version * P + live (in prompts) never exceeds (version + eta + 1) * P."""
        if admission.live != live:
            raise Violation(f"N_r: the budget counts {admission.live} live prompts, there are {live}")
        self.bound("N_r", "admission", live, (admission.staleness + 1) * admission.prompts_per_step)

    def loaded(self, engine: str, before: int, after: int) -> None:
        if after <= before:
            raise Violation(f"versions: {engine} goes from {before} to {after}")

    def snapshot(self, version: int, weights: int) -> None:
        if version != weights:
            raise Violation(f"versions: weights of step {weights} are published as version {version}")

    def divides_by(self, step: int, weights: int, divisors: list[int]) -> None:
        """The ratio divides by the policy at the start of the step, so that it is 1 at the first optimizer step."""
        if wrong := [v for v in divisors if v != weights]:
            raise Violation(
                f"prox: step {step} starts from weights {weights}, and its ratios divide by those of {wrong}"
            )

    # --- rows

    def seeded(self, sample: int, seed: int) -> None:
        """A sample has one seed, however often it is generated."""
        if self.seeds.setdefault(sample, seed) != seed:
            raise Violation(f"seeds: sample {sample} is generated with seed {seed}, and was with {self.seeds[sample]}")

    def fired(self, stage: str, samples: list[int]) -> None:
        self.firings[stage].append(str(samples))

    def ends_once(self, prompt: int, before: str | None, fate: str) -> None:
        if before != "live":
            raise Violation(f"prompt {prompt} ends as {fate}, and was {before}")
        self.fates.add((self._world.controller.version, fate))
        self.count(fate)

    def one_generation(self, where: str, sample: int, generations: list[int]) -> None:
        if len(set(generations)) > 1:
            raise Violation(f"mixed: {where} joins generations {generations} of sample {sample}")

    def batch(self, step: int, samples: list[int], inputs: list[list[int]]) -> None:
        """A batch has P groups of n samples, and every input holds exactly these rows in this order."""
        config = self._world.config
        if len(samples) != config.prompts * config.samples or len(set(samples)) != len(samples):
            raise Violation(f"batch {step} has {len(samples)} rows, {len(set(samples))} distinct")
        if any(rows != samples for rows in inputs):
            raise Violation(f"batch {step}: inputs {inputs} for samples {samples}")

    def row(self, step: int, sample: int, generations: list[int], versions: list[int]) -> None:
        """All inputs of a row in a closed batch derive from one generation, and none is too old."""
        self.one_generation(f"batch {step}", sample, generations)
        oldest = min(v for v in versions if v >= 0)
        self.bound("staleness", f"sample {sample} of step {step}", step - oldest, self._world.config.staleness)

    def trained(self, sink: str, step: int, rows: list[Any]) -> None:
        """Each sink trains each step once, and all of them train the same rows."""
        sinks = self._trained[step]
        if sink in sinks:
            raise Violation(f"doubled: {sink} trains step {step} again")
        if step and sink not in self._trained[step - 1]:
            raise Violation(f"lost: {sink} trains step {step} and not the one before")
        sinks[sink] = rows
        if any(other != rows for other in sinks.values()):
            raise Violation(f"step {step}: {sink} trains other rows than {sorted(sinks)}")

    # --- the end

    def finished(self) -> None:
        """Every prompt has ended and no part holds a row."""
        controller = self._world.controller
        if live := [p for p, fate in controller.fates.items() if fate == "live"]:
            raise Violation(f"lost: prompts {live[:4]} never ended")
        steps, prompts = self._world.config.steps, self._world.config.prompts
        if self.counts["trained"] != steps * prompts:
            raise Violation(f"{self.counts['trained']} prompts trained in {steps} steps of {prompts}")
        if leaks := list(self._world.leaks()):
            raise Violation(f"leak: {'; '.join(leaks)}")
