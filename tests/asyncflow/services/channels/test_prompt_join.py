"""The join before training: a prompt settles once, when every row of all its samples has arrived or failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncflow.services.channels.prompt_join import PromptJoin
from asyncflow.services.channels.row_table import Arrival
from protocols.control.notices import PromptSettled
from protocols.data.columns import Batch
from protocols.data.ids import BASELINE_INDEX, sample_id
from protocols.data.messages import Costs
from protocols.stage import Failure, Grain
from tests.asyncflow.services import rows

KINDS = (rows.rollouts, rows.log_probs, rows.values, rows.scores)


def group(prompt: int, samples: int = 2) -> list[int]:
    return [sample_id(prompt, i) for i in range(samples)]


def baseline(prompt: int) -> int:
    return sample_id(prompt, BASELINE_INDEX)


def join(edges: int = 2, samples: int = 2, *, partial: bool = False) -> PromptJoin:
    """A join whose edges all carry one row per sample."""
    grains: list[Grain] = ["sample"] * edges
    return PromptJoin(grains, samples, partial=partial)


def settled_by(
    join: PromptJoin, edge: int, batch: Batch | None, dead: Sequence[Failure] = (), attempt: int = 0
) -> list[PromptSettled]:
    """Deliver rows that must all be accepted, and return the prompts that they settle."""
    settled, arrival = join.arrive(edge, batch, list(dead), attempt)
    assert arrival.refused == []
    return settled


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[int, list[int]]], set[int]]:
    """Numbers of edges, prompts and samples per prompt; all rows in random deliveries; samples that fail on edge 0."""
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
    joined, settled = join(edges, samples), list[PromptSettled]()
    for edge, part in parts:
        alive = [s for s in part if edge or s not in dead]
        failures = [] if edge else rows.tombstones([s for s in part if s in dead])
        settled += joined.arrive(edge, KINDS[edge](alive) if alive else None, failures)[0]
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


@given(deliveries())
def test_a_join_of_partial_prompts_lets_two_or_more_samples_go_on_without_the_failed_ones(
    case: tuple[int, int, int, list[tuple[int, list[int]]], set[int]],
):
    edges, prompts, samples, parts, dead = case
    joined, settled = join(edges, samples, partial=True), list[PromptSettled]()
    for edge, part in parts:
        alive = [s for s in part if edge or s not in dead]
        failures = [] if edge else rows.tombstones([s for s in part if s in dead])
        settled += joined.arrive(edge, KINDS[edge](alive) if alive else None, failures)[0]
        assert joined.depth <= prompts * samples
    assert sorted(s.prompt_id for s in settled) == list(range(prompts))
    for prompt in settled:
        members = group(prompt.prompt_id, samples)
        assert prompt.alive == [s for s in members if s not in dead]
        assert {f.sample_id for f in prompt.dead} == dead & set(members), "each sample is alive or dead, never both"
        assert prompt.trains == (len(prompt.alive) >= 2 or not prompt.dead)
        assert prompt.partial == (prompt.trains and bool(prompt.dead))
    trained = [s for p in settled if p.trains for s in p.alive]
    assert joined.depth == len(trained), "the rows of samples that failed are let go"
    if trained:
        order = trained[::-1]
        assert joined.take(order) == tuple(KINDS[edge](order) for edge in range(edges))
    ids = [s for p in range(prompts) for s in group(p, samples)]
    assert sorted(joined.arrive(0, KINDS[0](ids), [])[1].refused) == ids, "rows that come again are refused"
    assert joined.depth == 0


@given(deliveries(), st.data())
def test_rows_that_come_again_at_any_time_settle_nothing_twice(
    case: tuple[int, int, int, list[tuple[int, list[int]]], set[int]], data: st.DataObject
):
    edges, prompts, samples, parts, dead = case
    joined, settled = join(edges, samples), list[int]()

    def bring(edge: int, part: list[int]) -> Arrival:
        alive = [s for s in part if edge or s not in dead]
        failures = [] if edge else rows.tombstones([s for s in part if s in dead])
        now, arrival = joined.arrive(edge, KINDS[edge](alive) if alive else None, failures)
        settled.extend(s.prompt_id for s in now)
        return arrival

    for number, (edge, part) in enumerate(parts):
        bring(edge, part)
        edge_again, part_again = parts[data.draw(st.integers(0, number), label="sent again")]
        again = bring(edge_again, part_again)
        assert (again.complete, sorted(again.refused)) == ([], sorted(part_again))
    assert sorted(settled) == list(range(prompts))


def test_a_prompt_waits_for_its_last_sample():
    joined = join(edges=1, samples=2)
    first, second = group(3)
    assert settled_by(joined, 0, rows.scores([first])) == []
    (settled,) = settled_by(joined, 0, rows.scores([second]))
    assert (settled.prompt_id, settled.alive, settled.dead) == (3, [first, second], [])


def test_a_group_that_lost_a_member_is_dead_and_says_who_would_have_lived():
    joined = join(edges=2, samples=2)
    first, second = group(3)
    settled_by(joined, 0, rows.scores([first, second]))
    (settled,) = settled_by(joined, 1, rows.log_probs([second]), rows.tombstones([first], "too long"))
    assert (settled.alive, settled.dead) == ([second], [Failure(first, "too long")])
    assert joined.depth == 0


def test_a_batch_may_take_prompts_in_any_order_and_leave_others():
    joined = join(edges=2)
    ids = [*group(0), *group(1), *group(2)]
    settled_by(joined, 0, rows.scores(ids))
    settled_by(joined, 1, rows.log_probs(ids[::-1]))
    order = [*group(2), *group(0)]
    assert joined.take(order) == (rows.scores(order), rows.log_probs(order))
    assert joined.depth == 2


def test_a_row_made_anew_takes_the_place_of_its_older_attempt():
    joined = join(edges=2, samples=1)
    (sample,) = group(0, 1)
    settled_by(joined, 0, rows.values([sample], version=1))
    assert settled_by(joined, 0, rows.values([sample], version=2), attempt=1) == []
    assert joined.arrive(1, rows.scores([sample]), [])[1].refused == [sample], "of the attempt that was given up"
    (settled,) = settled_by(joined, 1, rows.scores([sample]), attempt=1)
    assert settled.critic_version == 2


# --- the summary


def test_the_summary_says_how_old_the_oldest_token_and_value_are():
    joined = join(edges=3, samples=2)
    samples = group(0)
    settled_by(joined, 0, rows.rollouts(samples, versions=[[5, 6], [4, 4, 7]]))
    settled_by(joined, 1, rows.values(samples[:1], version=9))
    settled_by(joined, 1, rows.values(samples[1:], version=8))
    (settled,) = settled_by(joined, 2, rows.scores(samples))
    assert (settled.oldest_version, settled.critic_version, settled.tokens) == (4, 8, 5)
    assert settled.reward_sum == sum(samples)


def test_without_a_critic_there_is_no_critic_version():
    (settled,) = settled_by(join(edges=1, samples=1), 0, rows.rollouts([sample_id(0, 0)], versions=[[3]]))
    assert (settled.oldest_version, settled.critic_version) == (3, -1)


def costs(samples: Sequence[int]) -> Costs:
    """Each row's cost is its id."""
    return Costs(sample_ids=np.array(samples, np.int64), costs=np.array(samples, np.float32))


def test_the_summary_adds_costs_up_where_there_are_some():
    joined, samples = join(edges=2), group(1)
    settled_by(joined, 0, rows.scores(samples))
    (settled,) = settled_by(joined, 1, costs(samples))
    assert (settled.cost_sum, settled.reward_sum) == (sum(samples), sum(samples))
    (without,) = settled_by(join(edges=1), 0, rows.scores(samples))
    assert without.cost_sum is None


# --- prompts that are not trainable


def selective_join(*trainable: int) -> PromptJoin:
    """A join that takes only these prompts to be trainable, by the rows of their second sample edge."""

    def is_trainable(rows: Mapping[int, Batch]) -> bool:
        assert list(rows) == [0, 2]
        return int(rows[2].sample_ids[0]) in {group(prompt)[0] for prompt in trainable}

    return PromptJoin(("sample", "prompt", "sample"), 2, trainable=is_trainable)


def test_a_prompt_that_is_not_trainable_settles_alive_and_leaves_the_join_at_once():
    joined = selective_join(2)
    for prompt in (1, 2):
        settled_by(joined, 0, rows.log_probs(group(prompt)))
        settled_by(joined, 1, rows.scores([baseline(prompt)]))
    (dropped,) = settled_by(joined, 2, rows.scores(group(1)))
    assert (dropped.prompt_id, dropped.alive, dropped.dead, dropped.trainable) == (1, group(1), [], False)
    assert joined.depth == 3, "rows of the other prompt, whose scores are still to come"
    (taken,) = settled_by(joined, 2, rows.scores(group(2)))
    assert taken.trainable
    assert joined.take(group(2))[0] == rows.log_probs(group(2))


@pytest.mark.parametrize("attempt", [0, 1])
def test_rows_of_a_prompt_that_is_not_trainable_are_refused_in_any_attempt(attempt: int):
    joined, samples = selective_join(), group(1)
    settled_by(joined, 0, rows.log_probs(samples))
    settled_by(joined, 1, rows.scores([baseline(1)]))
    settled_by(joined, 2, rows.scores(samples))
    assert joined.arrive(2, rows.scores(samples), [], attempt) == ([], Arrival([], samples))
    assert joined.depth == 0


def test_a_group_that_lost_a_member_is_dead_whether_trainable_or_not():
    joined, (first, second) = selective_join(), group(1)
    settled_by(joined, 0, rows.log_probs([first]), rows.tombstones([second]))
    settled_by(joined, 1, rows.scores([baseline(1)]))
    (settled,) = settled_by(joined, 2, rows.scores([first, second]))
    assert (settled.dead, settled.trainable) == (rows.tombstones([second]), True)


# --- edges with one row per prompt: baselines

REMAX: tuple[Grain, ...] = ("sample", "prompt")


def with_baseline(samples: int = 2, grains: Sequence[Grain] = REMAX) -> PromptJoin:
    return PromptJoin(grains, samples)


def test_a_prompt_waits_for_its_baseline_whichever_comes_last():
    for baseline_last in (True, False):
        joined, samples = with_baseline(), group(3)
        brought = [(0, rows.scores(samples)), (1, rows.scores([baseline(3)]))]
        first, last = brought if baseline_last else brought[::-1]
        assert settled_by(joined, *first) == []
        (settled,) = settled_by(joined, *last)
        assert (settled.prompt_id, settled.alive, settled.dead) == (3, samples, [])


def test_a_prompts_baseline_stands_for_each_of_its_samples():
    joined = with_baseline()
    for prompt in (1, 2):
        settled_by(joined, 0, rows.log_probs(group(prompt)))
    settled_by(joined, 1, rows.scores([baseline(2), baseline(1)]))
    order = [group(2)[1], group(1)[0], group(2)[0], group(1)[1]]
    samples, baselines = joined.take(order)
    assert samples == rows.log_probs(order)
    expected = rows.scores([baseline(2), baseline(1), baseline(2), baseline(1)])
    assert baselines == replace(expected, sample_ids=np.array(order)), "aligned with the samples and named like them"
    assert joined.depth == 0


def test_edges_of_both_grains_keep_their_positions():
    joined = with_baseline(1, ("prompt", "sample", "prompt"))
    (sample,) = group(0, 1)
    settled_by(joined, 2, rows.values([baseline(0)]))
    settled_by(joined, 1, rows.scores([sample]))
    settled_by(joined, 0, rows.scores([baseline(0)]))
    first, second, third = joined.take([sample])
    named = np.array([sample])
    assert first == replace(rows.scores([baseline(0)]), sample_ids=named)
    assert second == rows.scores([sample])
    assert third == replace(rows.values([baseline(0)]), sample_ids=named)


def test_the_reward_is_that_of_the_samples_and_not_of_their_baseline():
    joined, samples = with_baseline(), group(1)
    settled_by(joined, 1, rows.scores([baseline(1)]))
    (settled,) = settled_by(joined, 0, rows.scores(samples))
    assert settled.reward_sum == sum(samples)


def test_samples_without_their_baseline_are_dead_and_say_why():
    joined, samples = with_baseline(), group(3)
    settled_by(joined, 0, rows.scores(samples))
    (settled,) = settled_by(joined, 1, None, rows.tombstones([baseline(3)], "too long"))
    assert settled.alive == []
    assert settled.dead == [Failure(s, "its prompt's baseline: too long") for s in samples]
    assert joined.depth == 0


def test_a_dead_sample_lets_go_of_the_baseline_too():
    joined, (first, second) = with_baseline(), group(3)
    settled_by(joined, 1, rows.scores([baseline(3)]))
    (settled,) = settled_by(joined, 0, rows.scores([first]), rows.tombstones([second]))
    assert (settled.alive, settled.dead) == ([first], rows.tombstones([second]))
    assert joined.depth == 0


# --- late rows


def test_a_row_that_comes_twice_is_refused():
    joined, samples = join(edges=2), group(0)
    settled_by(joined, 1, rows.scores(samples))
    assert joined.arrive(1, rows.scores(samples), []) == ([], Arrival([], samples))


@pytest.mark.parametrize("attempt", [0, 1])
def test_rows_of_a_prompt_that_has_settled_are_refused_in_any_attempt(attempt: int):
    """The controller has been told of the prompt's rows and may put them into a batch."""
    joined, samples = with_baseline(), group(0)
    settled_by(joined, 0, rows.scores(samples))
    settled_by(joined, 1, rows.scores([baseline(0)]))
    assert joined.arrive(0, rows.scores(samples), [], attempt) == ([], Arrival([], samples))
    assert joined.arrive(1, None, rows.tombstones([baseline(0)]), attempt) == ([], Arrival([], [baseline(0)]))
    assert joined.take(samples)[0] == rows.scores(samples)
    assert joined.arrive(0, rows.scores(samples), [], attempt)[1].refused == samples, "also while the batch trains"


@pytest.mark.parametrize("attempt", [0, 1])
def test_rows_of_a_prompt_that_died_are_refused(attempt: int):
    joined, (first, second) = join(edges=1), group(0)
    settled_by(joined, 0, rows.scores([first]), rows.tombstones([second]))
    assert joined.arrive(0, rows.scores([first, second]), [], attempt)[1].refused == [first, second]


def test_an_ended_prompt_lets_go_of_its_rows_and_refuses_the_rest():
    joined, (first, second) = with_baseline(), group(0)
    settled_by(joined, 0, rows.scores([first, *group(1)]))
    settled_by(joined, 1, rows.scores([baseline(0)]))
    joined.end([0])
    assert joined.depth == 2, "those of the other prompt"
    assert joined.arrive(0, rows.scores([second]), []) == ([], Arrival([], [second]))
    (settled,) = settled_by(joined, 1, rows.scores([baseline(1)]))
    assert settled.prompt_id == 1
