"""The staleness rules: each with a case that needs it, and all together under random schedules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncflow.control.admission.staleness import Admission, CompletePrompt, StalenessExceeded, check_age, choose_batch

# --- admission


def test_the_window_holds_every_prompt_that_staleness_lets_be_live():
    assert Admission(prompts_per_step=3, staleness=0, steps=9).window == 3
    assert Admission(prompts_per_step=3, staleness=2, steps=9).window == 9


def test_admission_ends_where_the_budget_does():
    admission = Admission(prompts_per_step=2, staleness=1, steps=9)
    assert admission.room() == 4
    admission.admit(4)
    assert admission.room() == 0
    with pytest.raises(ValueError, match="admitting 1 prompts where 0 have room"):
        admission.admit(1)
    assert (admission.live, admission.incomplete) == (4, 4)


def test_a_prompt_that_waits_for_its_step_keeps_its_budget():
    admission = Admission(prompts_per_step=1, staleness=0, steps=9)
    admission.admit(1)
    admission.complete()
    assert admission.room() == 0, "the version has not risen: one more would be trained one version too late"


def test_a_commit_gives_back_exactly_the_step_that_was_trained():
    admission = Admission(prompts_per_step=2, staleness=1, steps=9)
    admission.admit(4)
    admission.complete(3)
    admission.commit()
    assert (admission.version, admission.live, admission.room()) == (1, 2, 2)


def test_a_failed_prompt_is_refilled_only_when_its_last_row_has_arrived():
    """If the slot were freed at the failure, the join could hold more than W prompts."""
    admission = Admission(prompts_per_step=2, staleness=0, steps=9)
    admission.admit(2)
    admission.end()
    assert admission.room() == 0
    admission.complete()
    assert admission.room() == 1


def test_a_complete_prompt_that_failed_is_refilled():
    """If `live` were not decremented, the step would wait for a prompt that nobody generates."""
    admission = Admission(prompts_per_step=2, staleness=0, steps=9)
    admission.admit(2)
    admission.complete(2)
    assert admission.room() == 0
    admission.end()
    assert admission.room() == 1


def test_a_narrower_window_lets_fewer_prompts_be_incomplete():
    admission = Admission(prompts_per_step=2, staleness=2, steps=9)
    admission.window = 3
    assert admission.room() == 3
    admission.admit(3)
    admission.complete(2)
    assert admission.room() == 2
    admission.mark_incomplete()
    assert admission.room() == 1


def test_nothing_is_admitted_that_no_step_is_left_to_train():
    admission = Admission(prompts_per_step=2, staleness=3, steps=5, version=4)
    assert admission.room() == 2
    admission.admit(2)
    admission.complete(2)
    admission.commit()
    assert admission.room() == 0


def test_a_resumed_run_has_the_room_of_one_that_was_never_stopped():
    resumed = Admission(prompts_per_step=2, staleness=1, steps=9, version=3)
    assert resumed.room() == 4
    resumed.admit(4)
    assert resumed.room() == 0


@pytest.mark.parametrize(("prompts", "staleness", "steps", "version"), [(0, 0, 1, 0), (1, -1, 1, 0), (1, 0, 2, 3)])
def test_a_budget_that_means_nothing_is_refused(prompts: int, staleness: int, steps: int, version: int):
    with pytest.raises(ValueError, match=f"got {prompts}, {staleness}, {steps}"):
        Admission(prompts, staleness, steps, version)


# --- batches


def ready(*oldest: int) -> list[CompletePrompt]:
    return [CompletePrompt(prompt, version) for prompt, version in enumerate(oldest)]


def ids(batch: list[CompletePrompt] | None) -> list[int] | None:
    return None if batch is None else [r.prompt_id for r in batch]


def test_a_batch_waits_until_it_is_full():
    assert choose_batch(ready(0, 0), {}, step=0, prompts_per_step=3, staleness=0) is None
    assert ids(choose_batch(ready(0, 0, 0), {}, step=0, prompts_per_step=3, staleness=0)) == [0, 1, 2]


def test_the_oldest_weights_go_first_and_ids_break_ties():
    assert ids(choose_batch(ready(2, 1, 2, 1), {}, step=2, prompts_per_step=3, staleness=2)) == [1, 3, 0]


def test_a_batch_does_not_depend_on_the_order_of_arrival():
    prompts = ready(1, 0, 1, 0)
    batches = {
        tuple(ids(choose_batch(p, {}, 1, 2, 1)) or ()) for p in (prompts, prompts[::-1], prompts[2:] + prompts[:2])
    }
    assert batches == {(1, 3)}


def test_a_batch_waits_for_a_straggler_that_no_later_batch_could_take():
    """It was admitted at version 0 and is due by step 1: batch 2 would train it at age 2."""
    assert choose_batch(ready(1), {9: 0}, step=1, prompts_per_step=1, staleness=1) is None


def test_a_batch_does_not_wait_for_a_straggler_that_the_next_one_can_take():
    assert ids(choose_batch(ready(0), {9: 0}, step=0, prompts_per_step=1, staleness=1)) == [0]


def test_two_stragglers_that_fall_due_together_are_seen_before_they_are_due():
    """Nothing is due at step 1, but both stragglers are due by step 2, whose batch has room for one."""
    assert choose_batch(ready(1), {8: 0, 9: 0}, step=1, prompts_per_step=1, staleness=2) is None
    assert ids(choose_batch(ready(1), {9: 0}, step=1, prompts_per_step=1, staleness=2)) == [0]


def test_complete_prompts_that_are_left_out_are_due_like_stragglers():
    assert choose_batch(ready(0, 0, 0), {}, step=0, prompts_per_step=1, staleness=1) is None


def test_age_is_measured_against_the_step_that_trains():
    """At version 1 the prompt is one version old, and batch 2 trains it at age 2."""
    assert check_age(ready(0), step=1, staleness=1) == [1]
    with pytest.raises(StalenessExceeded, match="prompt 0 is 2 versions old at step 2, bound 1"):
        check_age(ready(0), step=2, staleness=1)


def test_every_prompt_of_a_batch_has_its_age():
    assert check_age(ready(0, 2, 1), step=2, staleness=2) == [2, 0, 1]


# --- all rules together


class Schedule:
    """A run without models: prompts are generated, fail, complete out of order and are trained at random."""

    def __init__(self, prompts_per_step: int, staleness: int, steps: int, chance: random.Random) -> None:
        self.admission = Admission(prompts_per_step, staleness, steps)
        self.chance = chance
        self.min_versions: dict[int, int] = {}  # incomplete prompts -> version at admission
        self.slow: set[int] = set()  # those with long responses, which complete when nothing else can go on
        self.ready: dict[int, CompletePrompt] = {}
        self.training: list[CompletePrompt] = []
        self.admitted = self.trained = self.failed = 0

    def run(self) -> None:
        failures = self.chance.choice([0.0, 0.1, 0.4])
        long = self.chance.choice([0.0, 0.2, 0.9])
        while self.admission.version < self.admission.steps:
            self.admit(long)
            self.check_bounds()
            moves = [self.complete] if self.min_versions.keys() - self.slow else []
            moves += [self.train] if self.training or self.form() else []
            if not moves:
                assert self.min_versions, f"deadlock at version {self.admission.version}: {self.ready}"
                moves = [self.complete]
            self.chance.choice(moves)(failures)

    def admit(self, long: float) -> None:
        for _ in range(self.admission.room()):
            self.admission.admit(1)
            self.min_versions[self.admitted] = self.admission.version
            if self.chance.random() < long:
                self.slow.add(self.admitted)
            self.admitted += 1

    def complete(self, failures: float) -> None:
        prompt = self.chance.choice(sorted(self.min_versions.keys() - self.slow) or sorted(self.slow))
        min_version = self.min_versions.pop(prompt)
        self.slow.discard(prompt)
        self.admission.complete()
        if self.chance.random() < failures:
            self.admission.end()
            self.failed += 1
        else:
            self.ready[prompt] = CompletePrompt(prompt, self.chance.randint(min_version, self.admission.version))

    def form(self) -> bool:
        a = self.admission
        chosen = choose_batch(self.ready.values(), self.min_versions, a.version, a.prompts_per_step, a.staleness)
        if chosen is not None:
            check_age(chosen, a.version, a.staleness)
            self.training = chosen
            for prompt in chosen:
                del self.ready[prompt.prompt_id]
        return chosen is not None

    def train(self, _: float) -> None:
        self.trained += len(self.training)
        self.training = []
        self.admission.commit()

    def check_bounds(self) -> None:
        a = self.admission
        assert len(self.min_versions) == a.incomplete <= a.window
        assert len(self.min_versions) + len(self.ready) + len(self.training) == a.live
        assert a.version * a.prompts_per_step + a.live <= (a.version + a.staleness + 1) * a.prompts_per_step


@settings(max_examples=300, deadline=None)
@given(
    prompts_per_step=st.integers(1, 4),
    staleness=st.integers(0, 3),
    steps=st.integers(1, 12),
    chance=st.randoms(use_true_random=False),
)
def test_no_schedule_deadlocks_exceeds_the_staleness_or_loses_a_prompt(
    prompts_per_step: int, staleness: int, steps: int, chance: random.Random
):
    schedule = Schedule(prompts_per_step, staleness, steps, chance)
    schedule.run()
    assert schedule.trained == steps * prompts_per_step
    assert schedule.admitted == schedule.trained + schedule.failed, "a finished run leaves nothing behind"
