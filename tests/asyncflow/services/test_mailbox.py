"""Mailboxes: each row comes out once with its columns aligned by id, whatever the order; credit waits, joins don't."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.mailbox import DuplicateRow, Firing, Mailbox, RowTable
from protocols.stage import Failure
from tests.asyncflow.services import rows

KINDS = (rows.scores, rows.log_probs, rows.values)


class Arrival(NamedTuple):
    """Rows that come together on one edge, values and tombstones."""

    edge: int
    values: list[int]
    dead: list[int]


@st.composite
def arrivals(draw: st.DrawFn, max_edges: int = 3, max_rows: int = 8) -> tuple[int, set[int], list[Arrival]]:
    """Edges, the ids of all rows, and any cut of them into deliveries, in any order over the edges."""
    edges = draw(st.integers(1, max_edges))
    samples = draw(st.lists(st.integers(0, 99), min_size=1, max_size=max_rows, unique=True))
    deliveries = []
    for edge in range(edges):
        left = draw(st.permutations(samples))
        while left:
            count = draw(st.integers(1, len(left)))
            part, left = left[:count], left[count:]
            dead = [s for s in part if draw(st.integers(0, 4)) == 0]
            deliveries.append(Arrival(edge, [s for s in part if s not in dead], dead))
    return edges, set(samples), draw(st.permutations(deliveries))


def bring(table: RowTable, arrival: Arrival) -> list[int]:
    batch = KINDS[arrival.edge](arrival.values) if arrival.values else None
    return table.arrive(arrival.edge, batch, rows.tombstones(arrival.dead, f"edge {arrival.edge}"))


@given(arrivals(), st.integers(1, 5), st.booleans())
def test_every_row_leaves_once_joined_by_id_or_as_one_tombstone(
    case: tuple[int, set[int], list[Arrival]], most: int, in_id_order: bool
):
    edges, samples, deliveries = case
    table, fired = RowTable(edges), list[Firing]()
    for arrival in deliveries:
        bring(table, arrival)
        if arrival.edge % 2:  # fire now and then, and not only at the end
            fired.append(table.fire(table.next_settled(most, in_id_order)))
    while table.settled:
        fired.append(table.fire(table.next_settled(most, in_id_order)))
    alive = [int(s) for f in fired if f.inputs for s in f.inputs[0].sample_ids]
    dead = [f.sample_id for firing in fired for f in firing.failures]
    expected_dead = {s for a in deliveries for s in a.dead}
    assert sorted(dead) == sorted(expected_dead)
    assert sorted(alive) == sorted(samples - expected_dead)
    assert len(table) == 0
    for firing in (f for f in fired if f.inputs):
        ids = firing.inputs[0].sample_ids.tolist()
        assert len(firing) == len(ids) <= most
        assert not in_id_order or ids == sorted(ids)
        for edge, batch in enumerate(firing.inputs):
            assert batch == KINDS[edge](ids), "every column holds the rows of the ids, in their order"


@given(arrivals())
def test_a_row_settles_with_its_last_edge_and_not_before(case: tuple[int, set[int], list[Arrival]]):
    edges, samples, deliveries = case
    table, seen, settled = RowTable(edges), dict.fromkeys(samples, 0), list[int]()
    for arrival in deliveries:
        for sample in (*arrival.values, *arrival.dead):
            seen[sample] += 1
        now = bring(table, arrival)
        assert set(now) == {s for s in (*arrival.values, *arrival.dead) if seen[s] == edges}
        settled += now
    assert sorted(settled) == sorted(samples)


def test_a_dead_row_takes_its_values_of_other_edges_with_it():
    table = RowTable(2)
    table.arrive(0, rows.scores([1, 2]), [])
    table.arrive(1, rows.log_probs([2]), rows.tombstones([1]))
    firing = table.fire(table.next_settled(5))
    assert firing.failures == [Failure(1, "timeout")]
    assert firing.inputs == (rows.scores([2]), rows.log_probs([2]))


def test_a_row_that_died_on_two_edges_is_one_tombstone():
    table = RowTable(2)
    table.arrive(1, None, rows.tombstones([1], "first"))
    table.arrive(0, None, rows.tombstones([1], "second"))
    firing = table.fire(table.next_settled(5))
    assert (firing.inputs, firing.failures, len(firing)) == ((), [Failure(1, "first")], 0)


@pytest.mark.parametrize("first_dead", [True, False])
@pytest.mark.parametrize("second_dead", [True, False])
def test_a_row_that_comes_twice_on_an_edge_is_refused(first_dead: bool, second_dead: bool):
    table = RowTable(2)

    def arrive(dead: bool) -> None:
        table.arrive(1, None if dead else rows.scores([7]), rows.tombstones([7]) if dead else [])

    arrive(first_dead)
    with pytest.raises(DuplicateRow, match="sample 7 arrived twice on input 1"):
        arrive(second_dead)


# --- waiting


def mailbox(edges: int = 1, capacity: int = 2, in_id_order: bool = False) -> Mailbox:
    return Mailbox(edges, capacity, in_id_order)


async def soon(work: asyncio.Task[None] | asyncio.Task[Firing], what: str) -> None:
    """Wait for something that is no longer held up; `what` names it where it is."""
    try:
        async with asyncio.timeout(5):
            await work
    except TimeoutError:
        pytest.fail(f"still waiting for {what}")


async def settled_loop() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_put_waits_where_the_mailbox_is_full_and_take_lets_it_in():
    box = mailbox(capacity=2)
    await box.put(0, rows.scores([1, 2]), [])
    waiting = asyncio.create_task(box.put(0, rows.scores([3]), []))
    await settled_loop()
    assert not waiting.done()
    assert box.depth == 2
    assert len(await box.take(1)) == 1
    await soon(waiting, "put, which has room now")
    assert box.depth == 2
    assert box.peak == 2


async def test_tombstones_take_room_like_rows():
    box = mailbox(capacity=2)
    await box.put(0, None, rows.tombstones([1, 2]))
    waiting = asyncio.create_task(box.put(0, None, rows.tombstones([3])))
    await settled_loop()
    assert not waiting.done()
    assert [f.sample_id for f in (await box.take(9)).failures] == [1, 2]
    await soon(waiting, "put of a tombstone")


async def test_a_delivery_larger_than_the_mailbox_goes_into_an_empty_one():
    """It could never fit otherwise, and its sender would wait for ever."""
    box = mailbox(capacity=2)
    await box.put(0, rows.scores([1]), [])
    waiting = asyncio.create_task(box.put(0, rows.scores([2, 3, 4]), []))
    await settled_loop()
    assert not waiting.done()
    await box.take(1)
    await soon(waiting, "put into an empty mailbox")
    assert len(await box.take(9)) == 3


async def test_a_join_never_waits():
    """With credit for two rows each edge would be full of rows whose partners the other edge keeps out."""
    box = mailbox(edges=2, capacity=2)
    async with asyncio.timeout(5):  # for puts that must not wait
        await box.put(0, rows.scores(range(10)), [])
        await box.put(0, rows.scores(range(10, 20)), [])
    assert (box.depth, box.capacity) == (20, 0)
    await box.put(1, rows.log_probs([19]), [])
    firing = await box.take(99)
    assert firing.inputs == (rows.scores([19]), rows.log_probs([19]))


async def test_take_waits_for_one_row_and_not_for_its_most():
    box = mailbox(capacity=8)
    taking = asyncio.create_task(box.take(8))
    await settled_loop()
    assert not taking.done()
    await box.put(0, rows.scores([5]), [])
    await soon(taking, "take, for which a row is there")
    assert taking.result().inputs == (rows.scores([5]),)


async def test_take_fires_on_tombstones_alone():
    box = mailbox()
    await box.put(0, None, rows.tombstones([1]))
    firing = await box.take(8)
    assert (firing.inputs, firing.failures) == ((), rows.tombstones([1]))


async def test_rows_leave_in_the_order_of_their_arrival_or_of_their_ids():
    for in_id_order, expected in ((False, [3, 1, 2]), (True, [1, 2, 3])):
        box = mailbox(capacity=8, in_id_order=in_id_order)
        for sample in (3, 1, 2):
            await box.put(0, rows.scores([sample]), [])
        assert (await box.take(8)).inputs[0].sample_ids.tolist() == expected


async def test_a_taker_that_gave_up_takes_nothing_with_it():
    box = mailbox()
    gone = asyncio.create_task(box.take(8))
    await settled_loop()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await box.put(0, rows.scores([1]), [])
    assert len(await box.take(8)) == 1


async def test_slow_and_fast_senders_lose_nothing_on_the_way_through_a_small_mailbox():
    box, samples, taken = mailbox(capacity=3), range(40), list[int]()

    async def send(own: range) -> None:
        for sample in own:
            await box.put(0, rows.scores([sample]), [])

    async with asyncio.timeout(10), asyncio.TaskGroup() as senders:  # for all rows to pass
        for start in range(4):
            senders.create_task(send(samples[start::4]))
        while len(taken) < len(samples):
            taken += (await box.take(2)).inputs[0].sample_ids.tolist()
            assert box.depth <= 3
    assert sorted(taken) == list(samples)
