"""Mailboxes: a put waits for room (except at a join), and a take waits for the first row, never for a minimum."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from asyncflow.services.channels.mailbox import Mailbox, has_room
from asyncflow.services.channels.row_table import Arrival, Joined
from protocols.data.ids import sample_id
from protocols.stage import Failure
from tests.asyncflow.services import rows

Value = str


def mailbox(edges: int = 1, capacity: int = 2, in_id_order: bool = False) -> Mailbox[Value]:
    return Mailbox(edges, capacity, in_id_order)


def values(samples: Iterable[int]) -> list[tuple[int, Value | Failure]]:
    return [(sample, f"value of {sample}") for sample in samples]


def dead(samples: Iterable[int]) -> list[tuple[int, Value | Failure]]:
    return [(f.sample_id, f) for f in rows.tombstones(list(samples))]


async def soon(work: asyncio.Task[Any], what: str) -> None:
    """Wait for a task that must be able to finish now; `what` names it in the message of a timeout."""
    try:
        async with asyncio.timeout(60):
            await work
    except TimeoutError:
        pytest.fail(f"still waiting for {what}")


async def held_up(work: asyncio.Task[Any]) -> bool:
    """Whether a task still waits after all other tasks have had their turns."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not work.done()


@pytest.mark.parametrize(
    ("held", "arriving", "enters"),
    [(0, 2, True), (1, 1, True), (1, 2, False), (2, 1, False), (2, 0, True), (0, 9, True), (1, 9, False)],
)
def test_a_delivery_enters_where_it_fits_or_never_could(held: int, arriving: int, enters: bool):
    assert has_room(held, arriving, capacity=2) == enters


# --- putting


async def test_put_waits_where_the_mailbox_is_full_and_take_lets_it_in():
    box = mailbox(capacity=2)
    await box.put(0, values([1, 2]))
    waiting = asyncio.create_task(box.put(0, values([3])))
    assert await held_up(waiting)
    assert box.depth == 2
    assert (await box.take(1)).samples == [1]
    await soon(waiting, "put, which has room now")
    assert (box.depth, box.peak, box.capacity) == (2, 2, 2)


async def test_tombstones_take_room_like_rows():
    box = mailbox(capacity=2)
    await box.put(0, dead([1, 2]))
    waiting = asyncio.create_task(box.put(0, dead([3])))
    assert await held_up(waiting)
    assert [f.sample_id for f in (await box.take(9)).failures] == [1, 2]
    await soon(waiting, "put of a tombstone")


async def test_only_new_rows_need_room():
    """A repeated delivery must enter a full mailbox, because its own rows are what fills it."""
    box = mailbox(capacity=2)
    await box.put(0, values([1, 2]))
    async with asyncio.timeout(60):  # for a put that must not wait
        assert await box.put(0, values([2, 1])) == Arrival([], [2, 1])
    await box.take(1)
    async with asyncio.timeout(60):  # one of three is new, and there is room for one
        assert await box.put(0, values([1, 2, 3])) == Arrival([3], [1, 2])


async def test_rows_that_are_put_twice_at_once_come_in_once():
    box = mailbox(capacity=1)
    await box.put(0, values([1]))
    waiting = [asyncio.create_task(box.put(0, values([2]))) for _ in range(2)]
    assert await held_up(waiting[0])
    await box.take(1)
    for put in waiting:
        await soon(put, "put: its row came in, by this call or the other")
    assert sorted([put.result().refused for put in waiting]) == [[], [2]]


async def test_a_delivery_larger_than_the_mailbox_goes_into_an_empty_one():
    """Otherwise it would never fit, and its sender would wait forever."""
    box = mailbox(capacity=2)
    await box.put(0, values([1]))
    waiting = asyncio.create_task(box.put(0, values([2, 3, 4])))
    assert await held_up(waiting)
    await box.take(1)
    await soon(waiting, "put into an empty mailbox")
    assert (await box.take(9)).samples == [2, 3, 4]


async def test_a_join_never_waits():
    """With a bound on each edge both could be full of rows whose partners the other edge keeps out: a deadlock."""
    box = mailbox(edges=2, capacity=2)
    async with asyncio.timeout(60):  # for puts that must not wait
        await box.put(0, values(range(10)))
        await box.put(0, values(range(10, 20)))
    assert (box.depth, box.capacity) == (20, 0)
    await box.put(1, values([19]))
    assert (await box.take(99)).samples == [19]


# --- taking


async def test_take_waits_for_one_row_and_not_for_its_most():
    box = mailbox(capacity=8)
    taking = asyncio.create_task(box.take(8))
    assert await held_up(taking)
    await box.put(0, values([5]))
    await soon(taking, "take, for which a row is there")
    assert taking.result() == Joined([5], (["value of 5"],), [])


async def test_take_returns_with_tombstones_alone():
    box = mailbox()
    await box.put(0, dead([1]))
    joined = await box.take(8)
    assert (joined.samples, joined.failures) == ([], rows.tombstones([1]))


async def test_rows_leave_in_the_order_of_their_arrival_or_of_their_ids():
    for in_id_order, expected in ((False, [3, 1, 2]), (True, [1, 2, 3])):
        box = mailbox(capacity=8, in_id_order=in_id_order)
        for sample in (3, 1, 2):
            await box.put(0, values([sample]))
        assert (await box.take(8)).samples == expected


async def test_a_taker_that_gave_up_takes_nothing_with_it():
    box = mailbox()
    gone = asyncio.create_task(box.take(8))
    assert await held_up(gone)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await box.put(0, values([1]))
    assert (await box.take(8)).samples == [1]


async def test_rows_that_could_not_be_read_can_be_put_again():
    box = mailbox()
    await box.put(0, values([1, 2]))
    await box.take(2)
    await box.take_back([2])
    assert await box.put(0, values([1, 2])) == Arrival([2], [1])


# --- the end of prompts


async def test_an_ended_prompt_makes_room():
    box, over, open_row = mailbox(capacity=1), sample_id(1, 0), sample_id(2, 0)
    await box.put(0, values([over]))
    waiting = asyncio.create_task(box.put(0, values([open_row])))
    assert await held_up(waiting)
    await box.end([1])
    await soon(waiting, "put: the row that filled the mailbox is over")
    assert (await box.take(9)).samples == [open_row]


async def test_a_sender_whose_own_prompt_ended_waits_no_longer():
    box, other, over = mailbox(capacity=1), sample_id(2, 0), sample_id(1, 0)
    await box.put(0, values([other]))
    waiting = asyncio.create_task(box.put(0, values([over])))
    assert await held_up(waiting)
    await box.end([1])
    await soon(waiting, "put of a row that nobody needs")
    assert waiting.result() == Arrival([], [over])
    assert box.depth == 1


# --- together


async def test_slow_and_fast_senders_lose_nothing_on_the_way_through_a_small_mailbox():
    box, samples, taken = mailbox(capacity=3), range(40), list[int]()

    async def send(own: range) -> None:
        for sample in own:
            await box.put(0, values([sample]))

    async with asyncio.timeout(60), asyncio.TaskGroup() as senders:  # for all rows to pass
        for start in range(4):
            senders.create_task(send(samples[start::4]))
        while len(taken) < len(samples):
            taken += (await box.take(2)).samples
            assert box.depth <= 3
    assert sorted(taken) == list(samples)
