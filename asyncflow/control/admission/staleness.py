"""Bounded staleness as pure decisions: when a prompt may be admitted, and which prompts form a batch.

A step consumes one batch of P prompts. A version is the number of committed steps. `staleness` (eta) bounds, in
versions, how much older a sample's oldest token may be than the step that trains it. Everything counts prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec


class Admission:
    """The budget of prompts in flight.

    Invariant: version * P + live <= (version + eta + 1) * P, and prompts are admitted only while fewer than W
    are incomplete. The second condition bounds every join at its source, so that no join ever has to refuse a row.
    """

    def __init__(self, prompts_per_step: int, staleness: int, steps: int, version: int = 0) -> None:
        if prompts_per_step < 1 or staleness < 0 or steps < version:
            given = f"{prompts_per_step}, {staleness}, {steps}"
            raise ValueError(f"want prompts_per_step >= 1, staleness >= 0, steps >= {version}; got {given}")
        self.prompts_per_step = prompts_per_step
        self.staleness = staleness
        self.steps = steps
        self.version = version  # committed steps
        self.live = 0  # admitted and not yet trained, dropped or failed
        self.incomplete = 0  # admitted, with a row that has not reached the join
        self.window = (staleness + 1) * prompts_per_step  # W; a smaller one bounds the joins more and overlaps less

    def room(self) -> int:
        """How many prompts may be admitted now; never more than the remaining steps will train."""
        ahead = min(self.staleness + 1, self.steps - self.version)
        return max(0, min(ahead * self.prompts_per_step - self.live, self.window - self.incomplete))

    def admit(self, prompts: int) -> None:
        """Take budget for new prompts. Raises ValueError if there is no room."""
        if prompts > self.room():
            raise ValueError(f"admitting {prompts} prompts where {self.room()} have room")
        self.live += prompts
        self.incomplete += prompts

    def complete(self, prompts: int = 1) -> None:
        """All rows of a prompt reached the join, alive or dead: its window slot is free."""
        self.incomplete -= prompts

    def mark_incomplete(self, prompts: int = 1) -> None:
        """The join lost the rows of complete prompts: they count in the window until all rows arrive again."""
        self.incomplete += prompts

    def end(self, prompts: int = 1) -> None:
        """A prompt was dropped or failed: its place is free for a refill."""
        self.live -= prompts

    def commit(self) -> None:
        """A step's prompts are trained: they leave the budget and the version rises, at once."""
        self.live -= self.prompts_per_step
        self.version += 1


class CompletePrompt(msgspec.Struct, frozen=True):
    """A prompt whose rows are all at the join and can be trained."""

    prompt_id: int
    oldest_version: int  # among its tokens and, if a critic is used, its values


def choose_batch(
    ready: Iterable[CompletePrompt], incomplete: Mapping[int, int], step: int, prompts_per_step: int, staleness: int
) -> list[CompletePrompt] | None:
    """The prompts of batch `step`, oldest weights first, or None while it must wait.

    Args:
        ready: complete prompts.
        incomplete: admission version of each live prompt that is not complete.
        step: the version that trains the batch; ages are measured against it, not against the current one.

    The batch waits for stragglers instead of dropping them later: it is formed only if, for every j from
    `step` to `step + staleness`, the prompts left out that fall due by j fit the batches up to j.
    """
    order = sorted(ready, key=lambda r: (r.oldest_version, r.prompt_id))
    if len(order) < prompts_per_step:
        return None
    chosen, left = order[:prompts_per_step], order[prompts_per_step:]
    due = [r.oldest_version + staleness for r in left] + [v + staleness for v in incomplete.values()]
    for j in range(step, step + staleness + 1):
        if sum(d <= j for d in due) > (j - step) * prompts_per_step:
            return None
    return chosen


class StalenessExceeded(Exception):
    """A batch holds a sample older than the bound: an invariant of the program is violated."""


def check_age(batch: Iterable[CompletePrompt], step: int, staleness: int) -> list[int]:
    """The age in versions of each prompt of a batch. Raises StalenessExceeded and names the first that is too old."""
    ages = []
    for prompt in batch:
        age = step - prompt.oldest_version
        if age > staleness:
            raise StalenessExceeded(
                f"prompt {prompt.prompt_id} is {age} versions old at step {step}, bound {staleness}"
            )
        ages.append(age)
    return ages
