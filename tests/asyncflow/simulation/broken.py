"""Variants of the real code, each without one rule, to show what the rule prevents."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.staleness import Admission, CompletePrompt, choose_batch
from asyncflow.control.device_lease import Claim, PoolLease, shared_leases
from asyncflow.services.channels.outbox import Outbox
from asyncflow.services.channels.prompt_join import PromptJoin
from asyncflow.services.channels.row_table import Arrival, Joined, RowTable
from protocols.control.notices import PromptSettled
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of
from protocols.stage import Failure, Grain

# --- joins


def credit(rows: int) -> Callable[[PromptJoin, int, list[int]], bool]:
    """A join that gives each input `rows` rows of credit, like a plain mailbox."""

    def has_credit(join: PromptJoin, position: int, samples: list[int]) -> bool:
        table = join._baselines if join._by_prompt[position] else join._samples
        held = sum(join._place[position] in row.slots for row in table._held.values())
        return held + len(table.fresh(join._place[position], samples)) <= rows

    return has_credit


class WithoutGrain(PromptJoin):
    """Waits for every input once per sample, even for inputs that come once per prompt."""

    def __init__(self, grains: Sequence[Grain], samples_per_prompt: int) -> None:
        super().__init__(["sample" for _ in grains], samples_per_prompt)


class BlindToBaselines(PromptJoin):
    """Keeps a prompt alive whose baseline failed."""

    def _failures(self, prompt: int, samples: list[int]) -> list[Failure]:
        return [f for s in samples if (f := self._samples.failure_of(s)) is not None]


class SettlesAtTheFirstDeath(PromptJoin):
    """Reports a prompt dead at its first tombstone, while other rows of it are in transit."""

    def arrive(
        self, position: int, batch: Batch | None, failures: list[Failure], attempt: int = 0
    ) -> tuple[list[PromptSettled], Arrival]:
        early = {prompt_of(f.sample_id) for f in failures if prompt_of(f.sample_id) not in self._samples._finished}
        settled, arrival = super().arrive(position, batch, failures, attempt)
        early -= {s.prompt_id for s in settled}
        self.end(sorted(early))
        return settled + [PromptSettled(p, [], failures) for p in sorted(early)], arrival


# --- admission


class KeepsSlotsUntilTrained(Admission):
    """Frees a prompt's window slot when the prompt has ended, not when all its rows are at the join."""

    def complete(self, prompts: int = 1) -> None:
        pass

    def end(self, prompts: int = 1) -> None:
        super().end(prompts)
        self.incomplete -= prompts

    def commit(self) -> None:
        super().commit()
        self.incomplete -= self.prompts_per_step


class CountsSamples(Admission):
    """Counts samples, two per prompt, instead of prompts: a failed sample frees only its own place."""

    holes = 0

    def room(self) -> int:
        return max(0, super().room() - (self.holes + 1) // 2)

    def end(self, prompts: int = 1) -> None:
        super().end(prompts)
        self.holes += prompts


class KeepsTheBudgetOfTheDead(Admission):
    """Keeps failed prompts in the budget."""

    def end(self, prompts: int = 1) -> None:
        pass


# --- batches


class Chooses(InFlightPrompts):
    """In-flight prompts with another choice of batches."""

    def choose(self) -> list[CompletePrompt] | None:
        oldest = {p: min(v for v in (s.oldest_version, s.critic_version) if v >= 0) for p, s in self._complete.items()}
        ready = [CompletePrompt(p, version) for p, version in oldest.items()]
        incomplete = {p: min_version for p, min_version in self._min_versions.items() if p not in self._complete}
        return self.choice(ready, incomplete)

    def choice(self, ready: list[CompletePrompt], incomplete: Mapping[int, int]) -> list[CompletePrompt] | None:
        raise NotImplementedError


class NewestFirst(Chooses):
    """Trains the newest rows first; waits for prompts that fall due, as the rule says."""

    def choice(self, ready: list[CompletePrompt], incomplete: Mapping[int, int]) -> list[CompletePrompt] | None:
        a = self.admission
        order = sorted(ready, key=lambda r: (-r.oldest_version, r.prompt_id))
        chosen, left = order[: a.prompts_per_step], order[a.prompts_per_step :]
        due = [r.oldest_version + a.staleness for r in left] + [v + a.staleness for v in incomplete.values()]
        late = any(
            sum(d <= j for d in due) > (j - a.version) * a.prompts_per_step
            for j in range(a.version, a.version + a.staleness + 1)
        )
        return None if late or len(chosen) < a.prompts_per_step else chosen


class LooksAtWhatIsDueNow(Chooses):
    """Waits for stragglers that are due in this step, but not for those that fall due together later."""

    def choice(self, ready: list[CompletePrompt], incomplete: Mapping[int, int]) -> list[CompletePrompt] | None:
        a = self.admission
        order = sorted(ready, key=lambda r: (r.oldest_version, r.prompt_id))
        chosen, left = order[: a.prompts_per_step], order[a.prompts_per_step :]
        due = [r.oldest_version + a.staleness for r in left] + [v + a.staleness for v in incomplete.values()]
        return None if any(d <= a.version for d in due) or len(chosen) < a.prompts_per_step else chosen


class AgesAgainstYesterday(Chooses):
    """Measures ages against the version that was current when the batch was formed, one step too early."""

    def choice(self, ready: list[CompletePrompt], incomplete: Mapping[int, int]) -> list[CompletePrompt] | None:
        a = self.admission
        return choose_batch(ready, incomplete, a.version - 1, a.prompts_per_step, a.staleness)


class NeverMarksIncomplete(InFlightPrompts):
    """Still counts prompts as complete after their join lost its memory."""

    def mark_incomplete(self, training: Collection[int] = ()) -> None:
        pass


# --- generation


class SeedsOfAGenerator:
    """Takes the next number of one random generator, which all rows share, as the seed."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def __call__(self, sample: int, generation: int) -> int:
        return self._random.getrandbits(63)


# --- leases


class LastComeFirstServed(PoolLease):
    """Grants the newest claim."""

    def ask(self, claim: Claim) -> Claim | None:
        granted = super().ask(claim)
        self._queue = deque([claim, *(c for c in self._queue if c is not claim)]) if granted is None else self._queue
        return granted


def last_come_first_served(pools: Mapping[str, str]) -> dict[str, PoolLease]:
    """The same leases as `shared_leases`, as `LastComeFirstServed`."""
    leases = {lease.pool: LastComeFirstServed(lease.pool) for lease in shared_leases(pools).values()}
    return {service: leases[pool] for service, pool in pools.items() if pool in leases}


# --- delivery


def exactly_room(held: int, arriving: int, capacity: int) -> bool:
    """Let a delivery that is larger than the mailbox wait forever."""
    return not arriving or held + arriving <= capacity


class ForgetsWhatLeft(RowTable[Any]):
    """Accepts a row again after it has left."""

    def take(self, samples: Sequence[int]) -> Joined[Any]:
        joined = super().take(samples)
        self._left.clear()
        return joined


class ForgetsWhatEnded(RowTable[Any]):
    """Accepts rows of finished prompts."""

    def end(self, prompts: Iterable[int]) -> None:
        for prompt in prompts:
            super().end([prompt])
            self._finished = type(self._finished)()


class NeverTakesBack(RowTable[Any]):
    """Counts a row that could not be read as received."""

    def take_back(self, samples: Iterable[int]) -> None:
        pass


class LetsGoOfWhatWasTaken(Outbox[Any]):
    """Drops rows as soon as their receiver acknowledged them."""

    def keep(self, edge: str, samples: Iterable[int], sent: Any) -> None:
        pass
