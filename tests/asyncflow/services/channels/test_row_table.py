"""The row table accepts each row of each edge once, in any order, and refuses repeated and late rows."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.channels.row_table import Arrival, Joined, RowTable
from protocols.data.ids import prompt_of, sample_id
from protocols.stage import Failure
from tests.asyncflow.services import rows

Value = tuple[int, int]  # edge and sample: names the row that it belongs to


class Brought(NamedTuple):
    """One delivery on one edge: values and tombstones."""

    edge: int
    values: list[int]
    dead: list[int] = []  # noqa: RUF012 - nobody writes to it

    def rows(self) -> list[tuple[int, Value | Failure]]:
        dead = rows.tombstones(self.dead, f"edge {self.edge}")
        return [*((s, (self.edge, s)) for s in self.values), *((f.sample_id, f) for f in dead)]

    @property
    def samples(self) -> list[int]:
        return [*self.values, *self.dead]


@st.composite
def arrivals(draw: st.DrawFn, max_edges: int = 3, max_rows: int = 8) -> tuple[int, set[int], list[Brought]]:
    """The number of edges, the ids of all rows, and random deliveries of them, in random order over the edges."""
    edges = draw(st.integers(1, max_edges))
    samples = draw(st.lists(st.integers(0, 99), min_size=1, max_size=max_rows, unique=True))
    deliveries = []
    for edge in range(edges):
        left = draw(st.permutations(samples))
        while left:
            count = draw(st.integers(1, len(left)))
            part, left = left[:count], left[count:]
            dead = [s for s in part if draw(st.integers(0, 4)) == 0]
            deliveries.append(Brought(edge, [s for s in part if s not in dead], dead))
    return edges, set(samples), draw(st.permutations(deliveries))


def table_of(edges: int, *brought: Brought, attempt: int = 0) -> RowTable[Value]:
    table: RowTable[Value] = RowTable(edges)
    for each in brought:
        bring(table, each, attempt)
    return table


def bring(table: RowTable[Value], brought: Brought, attempt: int = 0) -> Arrival:
    return table.arrive(brought.edge, brought.rows(), attempt)


def take_all(table: RowTable[Value]) -> Joined[Value]:
    return table.take(table.next_complete(99))


# --- joining


@given(arrivals(), st.integers(1, 5), st.booleans())
def test_every_row_leaves_once_joined_by_id_or_as_one_tombstone(
    case: tuple[int, set[int], list[Brought]], most: int, in_id_order: bool
):
    edges, samples, deliveries = case
    table, left = table_of(edges), list[Joined[Value]]()
    for brought in deliveries:
        bring(table, brought)
        if brought.edge % 2:  # let rows leave now and then, and not only at the end
            left.append(table.take(table.next_complete(most, in_id_order)))
    while table.complete:
        left.append(table.take(table.next_complete(most, in_id_order)))
    alive = [s for joined in left for s in joined.samples]
    dead = [f.sample_id for joined in left for f in joined.failures]
    expected_dead = {s for brought in deliveries for s in brought.dead}
    assert sorted(dead) == sorted(expected_dead)
    assert sorted(alive) == sorted(samples - expected_dead)
    assert len(table) == 0
    for joined in left:
        assert len(joined.samples) + len(joined.failures) <= most
        assert not in_id_order or joined.samples == sorted(joined.samples)
        for edge, values in enumerate(joined.inputs):
            assert values == [(edge, s) for s in joined.samples], "each input holds the rows of the ids, in order"


@given(arrivals())
def test_a_row_settles_with_its_last_edge_and_not_before(case: tuple[int, set[int], list[Brought]]):
    edges, samples, deliveries = case
    table, seen, settled = table_of(edges), dict.fromkeys(samples, 0), list[int]()
    for brought in deliveries:
        for sample in brought.samples:
            seen[sample] += 1
        now = bring(table, brought).complete
        assert set(now) == {s for s in brought.samples if seen[s] == edges}
        assert all(map(table.is_complete, now))
        settled += now
    assert sorted(settled) == sorted(samples)


def test_a_dead_row_takes_its_values_of_other_edges_with_it():
    joined = take_all(table_of(2, Brought(0, [1, 2]), Brought(1, [2], [1])))
    assert joined == Joined([2], ([(0, 2)], [(1, 2)]), [Failure(1, "edge 1")])


def test_a_row_that_died_on_two_edges_is_one_tombstone():
    joined = take_all(table_of(2, Brought(1, [], [1]), Brought(0, [], [1])))
    assert (joined.samples, joined.failures) == ([], [Failure(1, "edge 1")])


def test_a_row_that_is_not_complete_does_not_leave_and_holds_back_those_it_was_asked_with():
    table = table_of(2, Brought(0, [1, 2]), Brought(1, [1]))
    with pytest.raises(KeyError, match="sample 2 is incomplete"):
        table.take([1, 2])
    assert take_all(table).samples == [1]


# --- repeated deliveries


@given(arrivals(), st.data())
def test_what_is_sent_again_at_any_time_changes_nothing(case: tuple[int, set[int], list[Brought]], data: st.DataObject):
    edges, _, deliveries = case
    once, again = table_of(edges), table_of(edges)
    left: list[list[Joined[Value]]] = [[], []]
    for number, brought in enumerate(deliveries):
        bring(once, brought)
        bring(again, brought)
        repeated = deliveries[data.draw(st.integers(0, number), label="sent again")]
        assert bring(again, repeated) == Arrival([], repeated.samples)
        if data.draw(st.booleans(), label="rows leave"):
            left[0].append(take_all(once))
            left[1].append(take_all(again))
        assert bring(again, repeated) == Arrival([], repeated.samples), "also after it left"
    assert left[0] == left[1]


@pytest.mark.parametrize("first_dead", [True, False])
@pytest.mark.parametrize("second_dead", [True, False])
def test_of_a_value_and_a_tombstone_the_first_counts(first_dead: bool, second_dead: bool):
    first = Brought(0, [], [7]) if first_dead else Brought(0, [7])
    second = Brought(0, [], [7]) if second_dead else Brought(0, [7])
    table = table_of(1, first)
    assert bring(table, second) == Arrival([], [7])
    assert (table.failure_of(7) is not None) == first_dead


def test_a_row_that_stands_twice_in_one_delivery_counts_once():
    assert bring(table_of(1), Brought(0, [7, 8, 7])) == Arrival([7, 8], [7])


@given(arrivals(), st.lists(st.integers(0, 99), unique=True), st.integers(0, 2), st.integers(0, 1))
def test_fresh_rows_are_those_that_would_be_taken(
    case: tuple[int, set[int], list[Brought]], asked: list[int], attempt: int, finished: int
):
    edges, _, deliveries = case
    table = table_of(edges, *deliveries[::2])
    take_all(table)
    table.end([finished])
    asked = [*asked, sample_id(1, 0)]
    fresh = table.fresh(0, asked, attempt)
    refused = bring(table, Brought(0, asked), attempt).refused
    assert sorted([*fresh, *refused]) == sorted(asked)


# --- attempts


def test_a_newer_attempt_discards_what_an_older_one_brought():
    table = table_of(2, Brought(0, [7]))
    assert bring(table, Brought(1, [7]), attempt=1).complete == [], "values of two attempts are not one row's"
    assert bring(table, Brought(0, [7]), attempt=1).complete == [7]
    assert take_all(table).attempt == 1


def test_a_newer_attempt_takes_back_that_a_row_was_complete():
    table = table_of(2, Brought(0, [7]), Brought(1, [7]))
    bring(table, Brought(0, [7]), attempt=1)
    assert table.complete == 0
    assert not table.is_complete(7)


def test_a_newer_attempt_raises_the_dead():
    table = table_of(1, Brought(0, [], [7]))
    bring(table, Brought(0, [7]), attempt=1)
    assert take_all(table).samples == [7]


def test_a_late_row_of_an_older_attempt_is_refused():
    table = table_of(2, Brought(0, [7]), attempt=1)
    assert bring(table, Brought(1, [7])).refused == [7]
    assert table.complete == 0


def test_a_row_that_left_comes_again_in_a_newer_attempt_only():
    table = table_of(1, Brought(0, [7]), attempt=1)
    take_all(table)
    assert bring(table, Brought(0, [7]), attempt=0).refused == [7]
    assert bring(table, Brought(0, [7]), attempt=1).refused == [7]
    assert bring(table, Brought(0, [7]), attempt=2).complete == [7]


def test_rows_of_two_attempts_do_not_leave_together():
    table = table_of(1, Brought(0, [1, 2]))
    bring(table, Brought(0, [3]), attempt=1)
    bring(table, Brought(0, [4]))
    assert table.next_complete(9) == [1, 2, 4]
    assert take_all(table).attempt == 0
    assert take_all(table) == Joined([3], ([(0, 3)],), [], attempt=1)


# --- rows that are taken back


def test_rows_that_were_taken_back_can_be_sent_again():
    table = table_of(1, Brought(0, [1, 2]))
    take_all(table)
    table.take_back([1])
    assert bring(table, Brought(0, [1, 2])) == Arrival([1], [2])


def test_taking_back_what_never_left_changes_nothing():
    table = table_of(1, Brought(0, [1]))
    table.take_back([1, 5])
    assert take_all(table).samples == [1]


def test_a_row_whose_prompt_ended_meanwhile_is_not_taken_back():
    table = table_of(1, Brought(0, [1]))
    take_all(table)
    table.end([prompt_of(1)])
    table.take_back([1])
    assert bring(table, Brought(0, [1])).refused == [1]


# --- the end of prompts


def test_an_ended_prompt_lets_go_of_its_rows_and_of_no_others():
    first, second, other = sample_id(1, 0), sample_id(1, 1), sample_id(2, 0)
    table = table_of(2, Brought(0, [first, second, other]), Brought(1, [first, other]))
    table.end([1])
    assert (len(table), table.complete) == (1, 1)
    assert take_all(table).samples == [other]


@pytest.mark.parametrize("attempt", [0, 5])
def test_what_still_comes_of_an_ended_prompt_is_refused_in_any_attempt(attempt: int):
    early, late = sample_id(1, 0), sample_id(1, 1)
    table = table_of(1, Brought(0, [early]))
    table.end([1])
    assert bring(table, Brought(0, [early, late]), attempt).refused == [early, late]


def test_its_memory_is_that_of_the_prompts_in_flight():
    table, window, per_prompt = table_of(1), 8, 4
    for prompt in range(1000):
        bring(table, Brought(0, [sample_id(prompt, i) for i in range(per_prompt)]))
        if prompt % 2:
            take_all(table)
        table.end([prompt - window])
        assert len(table) + rows.remembered(table) <= (window + 1) * per_prompt
