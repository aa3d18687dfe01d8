"""The join completes the same prompts with the same rows in every order of its deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest

from asyncflow.services.channels.prompt_join import PromptJoin
from protocols.control.notices import PromptSettled
from protocols.data.ids import BASELINE_INDEX, sample_id
from protocols.data.messages import LogProbs, Rollouts, Scores
from protocols.stage import Failure, Grain
from tests.asyncflow.simulation.rows import Row, contents, message

FIRST, SECOND = sample_id(3, 0), sample_id(3, 1)
BASELINE = sample_id(3, BASELINE_INDEX)

Given = tuple[int, int, int, "int | None"]  # input, sample, attempt, generation (None for a tombstone)
THREE: list[Grain] = ["sample", "sample", "sample"]
KINDS = (Rollouts, LogProbs, Scores)


def outcome(
    grains: Sequence[Grain], samples: int, deliveries: Sequence[Given]
) -> tuple[list[PromptSettled], object, int]:
    """Deliver the rows one by one. Returns what settled, the batch of all live prompts, and the rows that are left."""
    join = PromptJoin(grains, samples)
    settled: list[PromptSettled] = []
    for position, sample, attempt, generation in deliveries:
        if generation is None:
            now, _ = join.arrive(position, None, [Failure(sample, "failed")], attempt)
        else:
            row = (sample, Row(generation, 0, -1, ("anyone", 0)))
            now, _ = join.arrive(position, message(KINDS[position], [row]), [], attempt)
        settled += now
    alive = [s for prompt in settled if not prompt.dead for s in prompt.alive]
    batch = [[row.generation for row in contents(column)] for column in join.take(alive)] if alive else None
    return settled, batch, join.depth


@pytest.mark.parametrize("dead", [None, (0, FIRST), (1, SECOND)])
def test_two_inputs_of_two_samples(dead: tuple[int, int] | None):
    rows: list[Given] = [(p, s, 0, None if (p, s) == dead else 1) for p in (0, 1) for s in (FIRST, SECOND)]
    for order in permutations(rows):
        (settled,), batch, left = outcome(["sample", "sample"], 2, order)
        assert [f.sample_id for f in settled.dead] == ([] if dead is None else [dead[1]])
        assert batch == ([[1, 1], [1, 1]] if dead is None else None)
        assert left == 0


@pytest.mark.parametrize("dead", [None, (0, FIRST), (2, BASELINE)])
def test_a_prompt_s_row_and_those_of_its_samples(dead: tuple[int, int] | None):
    grains: list[Grain] = ["sample", "sample", "prompt"]
    rows: list[Given] = [(p, s, 0, None if (p, s) == dead else 1) for p in (0, 1) for s in (FIRST, SECOND)]
    rows.append((2, BASELINE, 0, None if dead == (2, BASELINE) else 7))
    for order in permutations(rows):
        (settled,), batch, left = outcome(grains, 2, order)
        assert bool(settled.dead) == (dead is not None)
        assert batch == ([[1, 1], [1, 1], [7, 7]] if dead is None else None)
        assert left == 0


def test_what_comes_twice_counts_once():
    rows: list[Given] = [(p, s, 0, 1) for p in (0, 1) for s in (FIRST, SECOND)]
    for again in rows[:2]:
        for order in permutations([*rows, again]):
            assert outcome(["sample", "sample"], 2, order) == (
                [PromptSettled(3, [FIRST, SECOND], [], 0, -1, 2, 0.0)],
                [[1, 1], [1, 1]],
                0,
            )


@pytest.mark.parametrize("late", [(0, FIRST, 0, 1), (1, FIRST, 0, 1), (1, FIRST, 0, None)])
def test_parts_of_two_attempts_never_meet(late: Given):
    """One row of the first attempt arrives at any time among the rows of the second attempt.

    The join yields the second attempt only, because the first one was never complete.
    """
    second: list[Given] = [(p, s, 1, 2) for p in (0, 1) for s in (FIRST, SECOND)]
    for order in permutations([late, *second]):
        assert outcome(["sample", "sample"], 2, order) == (
            [PromptSettled(3, [FIRST, SECOND], [], 0, -1, 2, 0.0)],
            [[2, 2], [2, 2]],
            0,
        )


def test_a_prompt_is_of_one_attempt_or_of_the_other():
    """All rows of both attempts in every order: the sample is complete, and of one attempt."""
    both: list[Given] = [(p, FIRST, attempt, attempt + 1) for p in (0, 1, 2) for attempt in (0, 1)]
    seen = set()
    for order in permutations(both):
        (settled,), batch, left = outcome(THREE, 1, order)
        assert (settled.alive, settled.dead, left) == ([FIRST], [], 0)
        assert batch in ([[1]] * 3, [[2]] * 3)
        seen.add(str(batch))
    assert len(seen) == 2


def test_prompts_settle_by_themselves():
    """Rows of two prompts in any order: each prompt settles with its own last row."""
    other = sample_id(4, 0)
    rows: list[Given] = [(p, s, 0, 1) for p in (0, 1, 2) for s in (FIRST, other)]
    for order in permutations(rows):
        settled, batch, left = outcome(THREE, 1, order)
        last = {s: max(i for i, row in enumerate(order) if row[1] == s) for s in (FIRST, other)}
        assert [s.alive for s in settled] == [[s] for s in sorted(last, key=last.__getitem__)]
        assert (batch, left) == ([[1, 1]] * 3, 0)
