"""Rows for external workers: each is leased to one worker at a time, answered once, and waited for with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.observe.exporter import Exporter
from asyncflow.services.channels.endpoint import Frame, Payload, PayloadLost, ServiceError, ask
from asyncflow.services.channels.shard_refs import Partitioning, RankCallPlan, ShardRef, plan_calls, row_refs
from asyncflow.services.external_workers import (
    ANSWERED,
    OVER,
    ExternalRank,
    PendingCall,
    PendingRows,
    RowAnswer,
    take_rows,
)
from asyncflow.services.ranks.rank import RowReader
from asyncflow.services.ranks.spec import ModelSettings, ServiceSpec
from asyncflow.services.runtime.local import LocalRuntime
from asyncflow.services.runtime.local_store import LocalStore
from asyncflow.services.service import ModelService
from asyncflow.services.service_mode import ExternalMode
from asyncflow.services.stage_context import StageContext
from protocols.control.delivery import RankReply
from protocols.control.notices import Waiting
from protocols.control.replies import RowsPut
from protocols.control.requests import PutRows, TakeRows
from protocols.data import codec
from protocols.data.columns import Batch
from protocols.data.ids import INDEX_BITS
from protocols.data.messages import Rollouts
from protocols.layout.topology import Topology
from protocols.stage import Failure
from tests.asyncflow.services import rows, specs
from workers.settings import Failures, Model

STAGE = "reward.score#1"
RETAKE = 10.0


def asked_for(*shards: Sequence[int]) -> RankCallPlan:
    """A planned call for all rows of these shards."""
    parts = [rows.part(rows.rollouts(shard)) for shard in shards]
    found = row_refs(parts)
    (call,) = plan_calls(
        STAGE,
        "score",
        Partitioning("DP_PROTO"),
        [sample for sample, _ in found],
        [[place for _, place in found]],
        [Rollouts.schema_id],
        Topology(),
    )
    return call


def tombstones(*samples: int) -> dict[int, RowAnswer]:
    """Failures as answers, which need no batch."""
    return {sample: Failure(sample, "x") for sample in samples}


# --- pending rows


def opened(pending: PendingRows, *shards: Sequence[int]) -> PendingCall:
    """Add a call for these rows."""
    planned = asked_for(*shards)
    return pending.ask(planned.call, planned.payloads)


def test_each_row_is_given_to_one_worker():
    pending = PendingRows(RETAKE)
    opened(pending, [1, 2, 3])
    first, second = pending.take(2, 0.0), pending.take(2, 0.0)
    assert first is not None
    assert second is not None
    assert (first.call.sample_ids, second.call.sample_ids) == ([1, 2], [3])
    assert pending.take(2, 0.0) is None


def test_a_worker_reads_its_own_rows_and_gets_only_their_frames():
    pending = PendingRows(RETAKE)
    opened(pending, [1, 2, 3], [4, 5], [6])
    taken = [pending.take(2, 0.0) for _ in range(3)]
    assert [len(call.payloads) for call in taken if call is not None] == [1, 2, 2]
    for call, samples in zip(taken, ([1, 2], [3, 4], [5, 6]), strict=True):
        assert call is not None
        assert RowReader(call.call, call.payloads).inputs == [rows.rollouts(samples)]


def test_rows_without_an_answer_are_given_away_again_after_a_while():
    pending = PendingRows(RETAKE)
    opened(pending, [1, 2])
    pending.take(1, 0.0)
    pending.take(1, 4.0)
    assert pending.next_free() == RETAKE
    assert pending.take(9, RETAKE - 0.1) is None
    again = pending.take(9, RETAKE)
    assert again is not None
    assert again.call.sample_ids == [1]


def test_the_oldest_call_goes_first():
    pending = PendingRows(RETAKE)
    opened(pending, [5])
    opened(pending, [1])
    first = pending.take(9, 0.0)
    assert first is not None
    assert first.call.sample_ids == [5]


def test_an_answer_counts_once():
    pending = PendingRows(RETAKE)
    call = opened(pending, [1, 2])
    assert pending.answer(tombstones(1)) == {}
    assert pending.answer(tombstones(1)) == {1: ANSWERED}
    pending.close(call, "too late")
    assert pending.answer(tombstones(1, 2)) == {1: ANSWERED, 2: "too late"}


def test_what_is_not_pending_stays_with_the_asker():
    pending = PendingRows(RETAKE)
    opened(pending, [1])
    answers = tombstones(1, 7)
    assert pending.answer(answers) == {}
    assert list(answers) == [7]


def test_a_row_that_is_pending_again_is_open_again():
    pending = PendingRows(RETAKE)
    pending.close(opened(pending, [1]), "its bytes are sent again")
    opened(pending, [1])
    assert pending.answer(tombstones(1)) == {}


def test_rows_of_prompts_that_are_over_are_refused():
    pending = PendingRows(RETAKE)
    pending.end([5])
    assert pending.answer(tombstones(5 << INDEX_BITS)) == {5 << INDEX_BITS: OVER}


@given(st.data())
def test_however_rows_are_taken_and_put_each_is_answered_once(data: st.DataObject):
    samples = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True))
    pending, now, accepted = PendingRows(RETAKE), 0.0, list[int]()
    call = opened(pending, samples)
    while call.free_at:
        now += data.draw(st.sampled_from([0.0, 4.0, RETAKE]), label="time passes")
        taken = pending.take(data.draw(st.integers(1, 5), label="most"), now)
        put = set(taken.call.sample_ids if taken else []) | set(data.draw(st.lists(st.sampled_from(samples))))
        refused = pending.answer(tombstones(*put))
        accepted += sorted(put - refused.keys())
    assert sorted(accepted) == sorted(samples)
    assert pending.next_free() is None


# --- the rank that answers for external workers


def outside_reward(seconds: float = 60.0) -> ServiceSpec:
    """A service with an external reward. Unanswered rows are offered again after 0.1 s and fail after `seconds`."""
    failures = Failures(outside_timeout_seconds=seconds, outside_retake_seconds=0.1)
    stage = specs.stage(STAGE, schemas=[Rollouts.schema_id])
    return specs.service("reward", stage, settings=ModelSettings("reward", Model(outside=True), failures=failures))


@pytest.fixture
def context() -> Iterator[StageContext]:
    made = StageContext(outside_reward(), LocalStore(), Exporter("reward"))
    yield made
    made.close()


@pytest.fixture
def rank(context: StageContext) -> ExternalRank:
    return ExternalRank(context)


def asking(rank: ExternalRank, *shards: Sequence[int]) -> asyncio.Task[tuple[RankReply, list[Payload]]]:
    """A call to the rank that waits for its answers."""
    planned = asked_for(*shards)
    return asyncio.create_task(rank.call(0, planned.call, planned.payloads))


async def put(
    rank: ExternalRank,
    *batches: Batch,
    failures: Sequence[Failure] = (),
    lost: Sequence[int] = (),
    seconds: float = 0.0,
) -> RowsPut:
    parts = [rows.part(batch) for batch in batches]
    return await rank.put(PutRows([part.shard for part in parts], list(failures), list(lost), seconds), parts)


async def test_answers_in_any_order_and_number_become_one_reply_in_the_order_of_the_call(rank: ExternalRank):
    call = asking(rank, [4, 1], [3])
    for batch in (rows.scores([3]), rows.scores([1, 4])):
        assert await put(rank, batch, seconds=60.0) == RowsPut()
    reply, payloads = await call
    assert [codec.decode(payload) for payload in payloads] == [rows.scores([4, 1, 3])]
    assert [shard.sample_ids for shard in reply.shards] == [[4, 1, 3]]
    assert (reply.failures, reply.lost) == ([], [])


async def test_rows_fail_with_the_workers_cause_and_rows_whose_bytes_were_gone_are_lost(rank: ExternalRank):
    call = asking(rank, [1, 2, 3])
    await put(rank, rows.scores([1]), failures=[Failure(3, "unclear")], lost=[2], seconds=60.0)
    reply, _ = await call
    assert [shard.sample_ids for shard in reply.shards] == [[1]]
    assert (reply.failures, reply.lost) == ([Failure(3, "unclear")], [1])
    again = asking(rank, [2])  # sent again by its sender: it is answered like a new row
    assert await put(rank, rows.scores([2]), seconds=60.0) == RowsPut()
    assert [shard.sample_ids for shard in (await again)[0].shards] == [[2]]


async def test_rows_without_an_answer_in_time_fail_and_late_answers_are_refused():
    context = StageContext(outside_reward(seconds=0.3), LocalStore(), Exporter("reward"))
    rank = ExternalRank(context)
    call = asking(rank, [1, 2])
    await put(rank, rows.scores([1]), seconds=60.0)
    reply, _ = await call
    context.close()
    cause = "no answer from an external worker within 0.3 s"
    assert reply.failures == [Failure(2, cause)]
    assert await put(rank, rows.scores([2, 1])) == RowsPut({2: cause, 1: ANSWERED})


async def test_a_publisher_waits_until_its_rows_are_pending(rank: ExternalRank):
    """The first row is accepted at once although the second is requested only after the first is answered."""
    putting = asyncio.create_task(put(rank, rows.scores([1, 2]), seconds=10.0))
    first, _ = await asking(rank, [1])
    assert not putting.done()
    second, _ = await asking(rank, [2])
    assert await putting == RowsPut()
    assert [s.sample_ids for s in first.shards + second.shards] == [[1], [2]]


async def test_what_nobody_asks_for_is_named(rank: ExternalRank):
    assert await put(rank, rows.scores([7, 8]), seconds=0.05) == RowsPut({}, [7, 8])


async def test_waiting_workers_are_released_when_the_service_stops(rank: ExternalRank):
    putting = asyncio.create_task(put(rank, rows.scores([7]), seconds=60.0))
    taking = asyncio.create_task(rank.take(1, 60.0))
    await asyncio.sleep(0.05)
    await rank.stop()
    async with asyncio.timeout(60):
        assert await putting == RowsPut({}, [7])
        assert await taking is None


async def test_a_publisher_learns_that_a_prompt_has_ended(rank: ExternalRank):
    sample = 5 << INDEX_BITS
    putting = asyncio.create_task(put(rank, rows.scores([sample]), seconds=60.0))
    await asyncio.sleep(0)
    await rank.end([5])
    assert await asyncio.wait_for(putting, 60) == RowsPut({sample: OVER})


async def test_rows_of_a_silent_worker_go_to_the_next_one_that_waits(rank: ExternalRank):
    call = asking(rank, [1])
    silent = await rank.take(1, 60.0)
    prompt = await rank.take(1, 60.0)
    assert silent is not None
    assert prompt is not None
    assert prompt.call == silent.call
    await put(rank, rows.scores([1]))
    await call


def damaged(batch: Batch) -> ShardRef:
    part = rows.part(batch)
    return ShardRef(part.shard, rows.damaged(part.payload))


NOT_ANSWERS = {
    "another message": ([rows.part(rows.values([1]))], "wants Scores, got Values; nothing was taken"),
    "a damaged frame": (
        [damaged(rows.scores([1]))],
        "Scores that can't be read, nothing was taken: rows",
    ),
    "a row twice": ([rows.part(rows.scores([1])), rows.part(rows.scores([2, 1]))], r"samples \[1\] are put twice"),
}


@pytest.mark.parametrize("what", NOT_ANSWERS)
async def test_what_is_no_answer_is_refused_whole(rank: ExternalRank, what: str):
    parts, said = NOT_ANSWERS[what]
    call = asking(rank, [1, 2])
    request = PutRows([part.shard for part in parts], [Failure(2, "x")] if what != "a row twice" else [])
    with pytest.raises(ValueError, match=said):
        await rank.put(request, parts)
    assert await put(rank, rows.scores([2, 1]), seconds=60.0) == RowsPut()
    assert (await call)[0].failures == []


async def test_a_worker_takes_at_least_one_row(rank: ExternalRank):
    with pytest.raises(ValueError, match="most = 0: a worker takes 1 row or more"):
        await rank.take(0, 1.0)


async def test_the_wait_for_answers_is_reported_to_the_controller(rank: ExternalRank, context: StageContext):
    call = asking(rank, [1])
    await put(rank, rows.scores([1]), seconds=60.0)
    await call
    assert [(w.what, w.on) for w in await context.reports.notices() if isinstance(w, Waiting)] == [
        ("answers", "external workers"),
        ("", ""),
    ]


# --- a worker of a service


class Unreadable(LocalStore):
    """A store in which the frame of row 1 is gone and that of row 2 is damaged."""

    async def get(self, payload: Payload) -> Frame:
        (sample,) = codec.decode(payload).sample_ids.tolist()
        if sample == 1:
            raise PayloadLost("its owner is gone")
        return rows.damaged(payload) if sample == 2 else payload


async def test_a_worker_gets_what_can_be_read_and_the_rest_is_answered_for_it():
    service = ModelService(outside_reward(seconds=30.0), LocalStore())
    await service.start()
    mode = service._mode
    assert isinstance(mode, ExternalMode)
    call = asking(mode._rank, [1], [2], [3])
    over = asyncio.Event()
    got = []
    async for batch in take_rows(service, Unreadable(), 9, over.is_set):
        got.append(batch)
        await put(mode._rank, rows.scores([3]))
        over.set()
    reply, _ = await call
    await service.stop()
    assert got == [rows.rollouts([3])]
    assert [shard.sample_ids for shard in reply.shards] == [[3]]
    assert reply.lost == [0]
    (failure,) = reply.failures
    assert failure.sample_id == 2
    assert "its frame was refused" in failure.cause


async def test_a_service_that_does_its_work_itself_gives_no_rows_away():
    runtime = LocalRuntime()
    try:
        started = await runtime.start([specs.service("a", specs.stage("a.double#1"))])
        with pytest.raises(ServiceError, match="service a does its work itself, it has no external workers"):
            await ask(started["a"].endpoint, TakeRows(1, 0.0))
    finally:
        await runtime.stop()
