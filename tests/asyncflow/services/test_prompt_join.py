"""The join before the batch: a prompt settles once, when all rows of all its samples are there, alive or dead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.mailbox import DuplicateRow
from asyncflow.services.prompt_join import PromptJoin
from protocols.control import Settled
from protocols.ids import sample_id
from protocols.stage import Failure
from tests.asyncflow.services import rows

KINDS = (rows.rollouts, rows.log_probs, rows.values, rows.scores)


def group(prompt: int, samples: int = 2) -> list[int]:
    return [sample_id(prompt, i) for i in range(samples)]


def join(edges: int = 2, samples: int = 2) -> PromptJoin:
    return PromptJoin(edges, samples)


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[int, list[int]]], set[int]]:
    """Edges, prompts, samples a prompt, every row of every edge cut and mixed in any way, and who dies on edge 0."""
    edges, prompts, samples = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ids = [s for p in range(prompts) for s in group(p, samples)]
    parts = []
    for edge in range(edges):
        left = draw(st.permutations(ids))
        while left:
            count = draw(st.integers(1, len(left)))
            parts.append((edge, left[:count]))
            left = left[count:]
    dead = {s for s in ids if draw(st.integers(0, 5)) == 0}
    return edges, prompts, samples, draw(st.permutations(parts)), dead


@given(deliveries())
def test_each_prompt_settles_once_with_all_its_rows_or_none(
    case: tuple[int, int, int, list[tuple[int, list[int]]], set[int]],
):
    edges, prompts, samples, parts, dead = case
    joined, settled = join(edges, samples), list[Settled]()
    for edge, part in parts:
        alive = [s for s in part if edge or s not in dead]
        failures = [] if edge else rows.tombstones([s for s in part if s in dead])
        settled += joined.arrive(edge, KINDS[edge](alive) if alive else None, failures)
        assert joined.depth <= prompts * samples
    assert sorted(s.prompt_id for s in settled) == list(range(prompts))
    for prompt in settled:
        members = group(prompt.prompt_id, samples)
        assert prompt.alive == [s for s in members if s not in dead]
        assert {f.sample_id for f in prompt.dead} == dead & set(members)
    trained = [s for p in settled if not p.dead for s in p.alive]
    assert joined.depth == len(trained), "rows of dead prompts are let go at once"
    assert joined.peak <= prompts * samples
    if trained:
        order = trained[::-1]
        assert joined.take(order) == tuple(KINDS[edge](order) for edge in range(edges))
    assert joined.depth == 0


def test_a_prompt_waits_for_its_last_sample():
    joined = join(edges=1, samples=2)
    first, second = group(3)
    assert joined.arrive(0, rows.scores([first]), []) == []
    (settled,) = joined.arrive(0, rows.scores([second]), [])
    assert (settled.prompt_id, settled.alive, settled.dead) == (3, [first, second], [])


def test_a_group_that_lost_a_member_is_dead_and_says_who_would_have_lived():
    joined = join(edges=2, samples=2)
    first, second = group(3)
    joined.arrive(0, rows.scores([first, second]), [])
    (settled,) = joined.arrive(1, rows.log_probs([second]), rows.tombstones([first], "too long"))
    assert (settled.alive, settled.dead) == ([second], [Failure(first, "too long")])
    assert joined.depth == 0


def test_the_summary_says_how_old_the_oldest_token_and_value_are():
    joined = join(edges=3, samples=2)
    samples = group(0)
    joined.arrive(0, rows.rollouts(samples, versions=[[5, 6], [4, 4, 7]]), [])
    joined.arrive(1, rows.values(samples[:1], version=9), [])
    joined.arrive(1, rows.values(samples[1:], version=8), [])
    (settled,) = joined.arrive(2, rows.scores(samples), [])
    assert (settled.oldest_version, settled.critic_version, settled.tokens) == (4, 8, 5)
    assert settled.reward_sum == sum(samples)


def test_without_a_critic_there_is_no_critic_version():
    (settled,) = join(edges=1, samples=1).arrive(0, rows.rollouts([sample_id(0, 0)], versions=[[3]]), [])
    assert (settled.oldest_version, settled.critic_version) == (3, -1)


def test_a_row_that_comes_twice_is_refused():
    joined = join(edges=2)
    samples = group(0)
    joined.arrive(1, rows.scores(samples), [])
    with pytest.raises(DuplicateRow, match=f"sample {samples[0]} arrived twice on input 1"):
        joined.arrive(1, rows.scores(samples), [])


def test_a_batch_may_take_prompts_in_any_order_and_leave_others():
    joined = join(edges=2)
    ids = [*group(0), *group(1), *group(2)]
    joined.arrive(0, rows.scores(ids), [])
    joined.arrive(1, rows.log_probs(ids[::-1]), [])
    order = [*group(2), *group(0)]
    assert joined.take(order) == (rows.scores(order), rows.log_probs(order))
    assert joined.depth == 2
