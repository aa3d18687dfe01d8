"""Subscribers of a stage's output: each gets the deliveries in order, and none can block the service or fill its
memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from asyncflow.services.channels.endpoint import Endpoint, Frame, Payload, PayloadLost, ServiceError, ask
from asyncflow.services.channels.shard_refs import ShardRef, pack
from asyncflow.services.channels.subscriptions import (
    FORGET_SECONDS,
    MOST_DELIVERIES,
    MOST_READERS,
    Subscriptions,
    follow,
)
from asyncflow.services.ranks.spec import Target
from asyncflow.services.runtime.local import LocalRuntime
from asyncflow.services.runtime.local_store import LocalStore
from protocols.control.delivery import Delivery
from protocols.control.requests import NextRows, Subscribe
from protocols.data.messages import LogProbs
from tests.asyncflow.services import rows, specs

STAGE = "a.double#1"


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def subscriptions(clock: Clock) -> Subscriptions:
    return Subscriptions([STAGE, "a.add#1"], clock)


def delivery(*samples: int) -> list[ShardRef]:
    return [rows.part(rows.scores(samples))]


def names(parts: Sequence[ShardRef]) -> list[int]:
    return [sample for part in parts for sample in part.shard.sample_ids]


# --- queues


async def test_a_reader_gets_what_its_stage_sent_since_it_came_in_its_order(subscriptions: Subscriptions):
    subscriptions.offer(STAGE, delivery(1))
    number = subscriptions.open(STAGE)
    subscriptions.offer(STAGE, delivery(3, 2))
    subscriptions.offer("a.add#1", delivery(9))
    subscriptions.offer(STAGE, delivery(4))
    parts, missed = await subscriptions.next(number, 0.0)
    assert (names(parts), missed) == ([3, 2, 4], 0)
    assert await subscriptions.next(number, 0.0) == ([], 0)


async def test_readers_do_not_take_from_each_other(subscriptions: Subscriptions):
    first, second = subscriptions.open(STAGE), subscriptions.open(STAGE)
    subscriptions.offer(STAGE, delivery(1))
    for number in (first, second):
        parts, _ = await subscriptions.next(number, 0.0)
        assert names(parts) == [1]


async def test_a_poll_ends_with_the_first_rows(subscriptions: Subscriptions):
    number = subscriptions.open(STAGE)
    poll = asyncio.create_task(subscriptions.next(number, 30.0))
    await asyncio.sleep(0)
    subscriptions.offer(STAGE, delivery(1))
    parts, _ = await asyncio.wait_for(poll, 60)
    assert names(parts) == [1]


async def test_a_reader_that_is_too_slow_loses_the_oldest_and_is_told_once_how_many_rows(subscriptions: Subscriptions):
    number = subscriptions.open(STAGE)
    for sample in range(MOST_DELIVERIES + 3):
        subscriptions.offer(STAGE, delivery(2 * sample, 2 * sample + 1))
    parts, missed = await subscriptions.next(number, 0.0)
    assert missed == 2 * 3
    assert names(parts) == list(range(6, 2 * (MOST_DELIVERIES + 3)))
    subscriptions.offer(STAGE, delivery(999))
    assert (await subscriptions.next(number, 0.0))[1] == 0


async def test_a_reader_that_never_reads_holds_no_more_than_its_queue(subscriptions: Subscriptions):
    store = LocalStore()
    subscriptions.open(STAGE)
    frame = pack(store, rows.scores([1, 2, 3]), term=0).shard.nbytes
    for sample in range(10 * MOST_DELIVERIES):
        subscriptions.offer(STAGE, [pack(store, rows.scores([sample, sample + 1, sample + 2]), term=0)])
    assert rows.held_bytes(store) == MOST_DELIVERIES * frame


async def test_a_reader_that_stays_away_is_forgotten_with_all_that_waited_for_it(
    subscriptions: Subscriptions, clock: Clock
):
    store = LocalStore()
    number = subscriptions.open(STAGE)
    subscriptions.offer(STAGE, [pack(store, rows.scores([1]), term=0)])
    clock.now += FORGET_SECONDS + 1
    subscriptions.offer("a.add#1", delivery(2))
    assert (len(subscriptions), rows.held_bytes(store)) == (0, 0)
    with pytest.raises(LookupError, match=f"no subscription {number}: .*not read for 60 s.*subscribe again"):
        await subscriptions.next(number, 0.0)


async def test_a_reader_is_not_forgotten_while_it_waits_for_rows(subscriptions: Subscriptions, clock: Clock):
    number = subscriptions.open(STAGE)
    poll = asyncio.create_task(subscriptions.next(number, 30.0))
    await asyncio.sleep(0)
    clock.now += FORGET_SECONDS + 1
    subscriptions.offer(STAGE, delivery(1))
    assert names((await poll)[0]) == [1]
    clock.now += FORGET_SECONDS - 1
    subscriptions.offer(STAGE, delivery(2))
    assert names((await subscriptions.next(number, 0.0))[0]) == [2]


def test_the_number_of_readers_is_bounded_and_those_that_left_make_room(subscriptions: Subscriptions):
    numbers = [subscriptions.open(STAGE) for _ in range(MOST_READERS)]
    with pytest.raises(RuntimeError, match=f"{MOST_READERS} subscriptions are open"):
        subscriptions.open(STAGE)
    subscriptions.close(numbers[0])
    subscriptions.close(numbers[0])
    subscriptions.open(STAGE)


def test_a_stage_that_sends_nothing_has_no_readers(subscriptions: Subscriptions):
    with pytest.raises(LookupError, match=r"no stage 'a.count#1' sends rows here; there is a.double#1, a.add#1"):
        subscriptions.open("a.count#1")


# --- a subscriber of a running service


class Doubling:
    """A service that doubles log-probs and sends them to a service that holds them in a join."""

    def __init__(self, runtime: LocalRuntime, endpoint: Endpoint) -> None:
        self.store = runtime.store
        self.endpoint = endpoint
        self.stop = runtime.stop

    async def feed(self, *samples: int) -> None:
        part = pack(self.store, rows.log_probs(samples), term=0)
        await self.endpoint.deliver(Delivery(f"{STAGE}.0", 0, [part.shard]), [part.payload])


@pytest.fixture
async def service() -> AsyncIterator[Doubling]:
    sends = specs.stage(STAGE, outputs=[Target("b", "b.add#1.0")])
    joins = specs.stage("b.add#1", sources=[STAGE, "source"])
    runtime = LocalRuntime()
    try:
        started = await runtime.start([specs.service("a", sends), specs.service("b", joins)])
        yield Doubling(runtime, started["a"].endpoint)
    finally:
        await runtime.stop()


async def test_a_reader_reads_typed_rows_until_the_run_is_over_and_no_queue_is_left(service: Doubling):
    over = asyncio.Event()
    following = follow(service.endpoint, service.store, STAGE, LogProbs, over.is_set)
    reading = asyncio.create_task(anext(following))
    await asyncio.sleep(0)
    await service.feed(1, 2)
    batch, missed = await reading
    assert isinstance(batch, LogProbs)
    assert (batch.sample_ids.tolist(), batch.log_probs.values.tolist(), missed) == ([1, 2], [-2, -2, -4, -4, -4], 0)
    over.set()
    assert [received async for received in following] == []
    with pytest.raises(ServiceError, match=r"no stage 'b\.add#1' sends rows here"):
        await anext(follow(service.endpoint, service.store, "b.add#1", LogProbs, over.is_set))


class Unreadable(LocalStore):
    """A store in which the first frame that is read is gone and the second is damaged."""

    reads = 0

    async def get(self, payload: Payload) -> Frame:
        self.reads += 1
        if self.reads == 1:
            raise PayloadLost("its owner is gone")
        return rows.damaged(payload) if self.reads == 2 else payload


async def test_rows_that_can_not_be_read_are_missed_and_the_others_are_not(service: Doubling):
    following = follow(service.endpoint, Unreadable(), STAGE, LogProbs, lambda: False)
    received: list[tuple[list[int], int]] = []
    for samples in ((1, 2), (3,), (4,)):
        reading = asyncio.create_task(anext(following))
        await asyncio.sleep(0)
        await service.feed(*samples)
        batch, missed = await asyncio.wait_for(reading, 60)
        received.append((batch.sample_ids.tolist() if batch is not None else [], missed))
    assert received == [([], 2), ([], 1), ([4], 0)]
    await following.aclose()


async def test_leaving_the_iteration_ends_the_subscription(service: Doubling):
    following = follow(service.endpoint, service.store, STAGE, LogProbs, lambda: False)
    reading = asyncio.create_task(anext(following))
    await asyncio.sleep(0)
    await service.feed(1)
    await reading
    await following.aclose()
    for _ in range(MOST_READERS):  # all slots are free again
        await ask(service.endpoint, Subscribe(STAGE))


async def test_a_reader_whose_service_forgot_it_is_told_so(service: Doubling):
    with pytest.raises(ServiceError, match="NextRows: LookupError: no subscription 7"):
        await ask(service.endpoint, NextRows(7, 0.0))
