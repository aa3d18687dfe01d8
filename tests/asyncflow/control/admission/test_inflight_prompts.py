"""In-flight prompts: each live prompt is counted once, and a finished prompt makes room for another."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from asyncflow.control.admission.inflight_prompts import InFlightPrompts, ended_samples, failed_samples
from asyncflow.control.admission.staleness import Admission
from protocols.control.notices import PromptSettled
from protocols.stage import Failure


def inflight(prompts_per_step: int = 2, staleness: int = 0, max_refills: int = 1) -> InFlightPrompts:
    return InFlightPrompts(Admission(prompts_per_step, staleness, steps=10), max_refills)


def alive(prompt: int, oldest: int = 0, critic: int = -1) -> PromptSettled:
    return PromptSettled(prompt, [prompt * 10], [], oldest_version=oldest, critic_version=critic)


def dead(prompt: int) -> PromptSettled:
    return PromptSettled(prompt, [], [Failure(prompt * 10, "raised")])


def test_a_batch_waits_for_its_last_prompt_and_leaves_with_the_commit():
    prompts = inflight()
    prompts.admit([1, 2])
    prompts.complete(alive(2))
    assert prompts.choose() is None
    prompts.complete(alive(1))
    batch = prompts.choose()
    assert batch is not None
    assert [s.prompt_id for s in prompts.notices_of(batch)] == [1, 2]
    prompts.commit(batch)
    assert (prompts.ready, prompts.admission.live, prompts.admission.version) == (0, 0, 1)


def test_a_dead_prompt_makes_room_for_exactly_one_other():
    prompts = inflight()
    prompts.admit([1, 2])
    assert prompts.admission.room() == 0
    prompts.complete(dead(1))
    assert prompts.admission.room() == 1
    prompts.admit([3])
    prompts.complete(alive(2))
    prompts.complete(alive(3))
    assert [r.prompt_id for r in prompts.choose() or []] == [2, 3]


def test_a_prompt_that_trains_without_its_failures_waits_for_a_batch_and_then_ends_them():
    prompts = inflight(prompts_per_step=1)
    prompts.admit([1])
    partial = replace(dead(1), alive=[11, 12], partial=True)
    prompts.complete(partial)
    assert prompts.choose() is not None
    assert failed_samples([partial]) == [(10, "failed", "raised")]
    dropped = replace(partial, trainable=False)
    assert ended_samples(dropped) == [
        (10, "failed", "raised"),
        (11, "dropped", "no_signal"),
        (12, "dropped", "no_signal"),
    ]
    incomplete = replace(dead(1), alive=[11])
    assert ended_samples(incomplete) == [(10, "failed", "raised"), (11, "dropped", "group_incomplete")]


def test_a_dropped_prompt_leaves_like_a_failed_one():
    """Dynamic sampling drops a prompt whose samples have equal scores, because it has no gradient."""
    prompts = inflight()
    prompts.admit([1, 2])
    prompts.complete(alive(1))
    prompts.drop(1)
    assert (prompts.ready, prompts.admission.live, prompts.admission.incomplete) == (0, 1, 1)
    assert prompts.admission.room() == 1
    with pytest.raises(KeyError):
        prompts.drop(2)


def test_a_prompt_that_is_not_worth_training_makes_room_and_counts_as_rejected():
    prompts = inflight(prompts_per_step=1, max_refills=1)
    for prompt in range(2):
        assert prompts.rejects() is None
        prompts.admit([prompt])
        for _ in range(2):
            prompts.complete(replace(alive(prompt), trainable=False))
        assert (prompts.ready, prompts.admission.live, prompts.admission.room()) == (0, 0, 1)
    assert prompts.take_finished() == [0, 1]
    assert prompts.rejects() is not None


def test_what_is_told_twice_changes_nothing():
    prompts = inflight()
    prompts.admit([1, 2])
    for _ in range(2):
        prompts.complete(alive(1))
        assert (prompts.ready, prompts.admission.incomplete) == (1, 1)
    for _ in range(2):
        prompts.complete(dead(2))
        assert (prompts.admission.live, prompts.admission.room()) == (1, 1)
    assert prompts.take_finished() == [2]


def test_of_two_words_about_a_prompt_the_last_counts():
    prompts = inflight(prompts_per_step=1, staleness=1)
    prompts.admit([1])
    prompts.complete(alive(1, oldest=0))
    prompts.complete(alive(1, oldest=1))
    assert [r.oldest_version for r in prompts.choose() or []] == [1]
    prompts.complete(dead(1))
    assert prompts.choose() is None
    assert (prompts.admission.live, prompts.admission.incomplete) == (0, 0)


def test_prompts_whose_join_lost_its_memory_complete_again():
    prompts = inflight()
    prompts.admit([1, 2])
    prompts.complete(alive(1))
    prompts.mark_incomplete()
    assert (prompts.admission.live, prompts.admission.incomplete) == (2, 2)
    prompts.complete(alive(2))
    assert prompts.choose() is None
    prompts.complete(alive(1))
    batch = prompts.choose() or []
    assert [r.prompt_id for r in batch] == [1, 2]
    prompts.mark_incomplete(training={1, 2})
    assert prompts.admission.incomplete == 0, "the batch that trains has left the join"
    prompts.commit(batch)


def test_the_prompts_that_ended_are_told_once():
    prompts = inflight(prompts_per_step=1, staleness=1)
    prompts.admit([1, 2])
    prompts.complete(dead(1))
    prompts.complete(alive(2))
    prompts.commit(prompts.choose() or [])
    assert prompts.take_finished() == [1, 2]
    assert prompts.take_finished() == []


def test_the_critic_s_version_ages_a_prompt_like_its_tokens_do():
    prompts = inflight(prompts_per_step=1, staleness=1)
    prompts.admit([1])
    prompts.complete(alive(1, oldest=3, critic=2))
    assert [r.oldest_version for r in prompts.choose() or []] == [2]


def test_too_many_rejected_prompts_in_one_step_are_told_with_their_share():
    prompts = inflight(prompts_per_step=1, max_refills=2)
    for prompt in range(3):
        assert prompts.rejects() is None
        prompts.admit([prompt])
        prompts.complete(dead(prompt))
    assert prompts.rejects() == (
        "step 0: 3 prompts failed or were dropped, more than max_refills = 2 rounds of 1 (reject rate at least 75%)"
    )


def test_admitting_without_room_is_refused():
    prompts = inflight()
    with pytest.raises(ValueError, match="admitting 3 prompts where 2 have room"):
        prompts.admit([1, 2, 3])
