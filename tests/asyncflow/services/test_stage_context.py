"""The context of a stage calls the ranks, sends their outputs, and keeps these until no prompt needs them."""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.services.channels.endpoint import causes
from asyncflow.services.channels.shard_refs import RowRef, ShardRef, row_refs
from asyncflow.services.firing import Fired, check_complete
from asyncflow.services.ranks.spec import ServiceSpec, StageSpec, Target
from asyncflow.services.reports import MOST_NOTICES
from asyncflow.services.stage_context import StageContext
from protocols.control.notices import Busy, LeaseAsked, LeaseReturned, Waiting
from protocols.data import codec
from protocols.data.ids import sample_id
from protocols.data.messages import LogProbs, Scores
from protocols.layout.topology import Topology
from protocols.stage import Failure
from tests.asyncflow.services import rows, specs
from tests.asyncflow.services.hosting import Consumer, hosted

TO_B, TO_C = Target("b", "b.double#1.0"), Target("c", "c.double#1.0")
SENDING = specs.stage("a.double#1", outputs=[TO_B])
SENDING_TO_TWO = specs.stage("a.double#1", outputs=[TO_B, TO_C])
SPEC = specs.service("a", SENDING)
FOUR = Topology(1, 1, 4)


def spec_of(stage: StageSpec, topology: Topology = FOUR) -> ServiceSpec:
    return specs.service("a", stage, topology=topology)


def firing(*parts: ShardRef) -> tuple[list[int], list[list[RowRef]]]:
    """Sample ids and row references of one input, as `fire` takes them."""
    located = row_refs(parts)
    return [sample for sample, _ in located], [[place for _, place in located]]


# --- each row leaves once


def test_values_and_tombstones_together_are_the_rows_that_were_taken():
    check_complete("reward.score#1", [1, 2, 3], Fired(failures=[Failure(3, "x")], lost=[1, 2]))


@pytest.mark.parametrize(
    ("given", "wrong"),
    [([1], r"\[2\]"), ([1, 2, 2], r"\[2\]"), ([1, 2, 9], r"\[9\]")],
    ids=["vanished", "value and tombstone", "of nobody"],
)
def test_a_row_that_does_not_leave_exactly_once_is_an_error_that_names_it(given: list[int], wrong: str):
    with pytest.raises(ValueError, match=rf"reward\.score#1: took 2 rows .*{wrong}"):
        check_complete("reward.score#1", [1, 2], Fired(lost=given))


# --- firing


async def test_ranks_share_the_rows_and_their_outputs_stand_in_order():
    stage = specs.stage("a.double#1")
    async with hosted(spec_of(stage)) as context:
        samples, inputs = firing(rows.part(rows.log_probs([5, 3, 8])), rows.part(rows.log_probs([1, 9])))
        fired = await context.fire(stage, samples, inputs)
        assert [part.shard.sample_ids for part in fired.parts] == [[5, 3], [8], [1], [9]], "a shard a rank"
        for part in fired.parts:
            batch = codec.decode(part.payload)
            assert isinstance(batch, LogProbs)
            for sample, values in zip(batch.sample_ids, batch.log_probs, strict=True):
                assert (values == -2 * sample).all()
        assert (fired.failures, fired.lost) == ([], [])


async def test_what_each_rank_read_is_counted_and_when_it_worked():
    stage = specs.stage("a.double#1")
    async with hosted(spec_of(stage)) as context:
        part = rows.part(rows.log_probs([1, 2, 3, 4]))
        await context.fire(stage, *firing(part), step=7)
        edge = context.counts.statistics("a.double#1.0", 0, 0, 0)
        assert edge.read_bytes == dict.fromkeys(range(4), part.shard.nbytes), "a small frame is one block"
        (span,) = [s for notice in await context.reports.notices() if isinstance(notice, Busy) for s in notice.spans]
        assert (span.service, span.activity, span.rows, span.step) == ("a", "a.double#1", 4, 7)


async def test_rows_that_could_not_be_read_are_told_by_their_ids():
    stage = specs.stage("a.double#1")
    async with hosted(spec_of(stage)) as context:
        whole, torn = rows.part(rows.log_probs([1, 2, 3])), rows.part(rows.log_probs([4, 5, 6]))
        fired = await context.fire(stage, *firing(whole, ShardRef(torn.shard, rows.damaged(torn.payload))))
        assert sorted(s for part in fired.parts for s in part.shard.sample_ids) == [1, 2, 3]
        assert [f.sample_id for f in fired.failures] == [4, 5, 6]
        assert all("its frame was refused" in f.cause for f in fired.failures)
        assert context.counts.statistics("a.double#1.0", 0, 0, 0).damaged == 3


async def test_a_row_that_replicas_could_not_read_counts_once():
    stage = specs.stage("a.double#1", protocol="3D_PROTO")
    async with hosted(spec_of(stage, topology=Topology(1, 2, 1))) as context:
        torn = rows.part(rows.log_probs([4, 5]))
        fired = await context.fire(stage, *firing(ShardRef(torn.shard, rows.damaged(torn.payload))))
        assert [f.sample_id for f in fired.failures] == [4, 5]
        assert context.counts.statistics("a.double#1.0", 0, 0, 0).damaged == 2


async def test_failures_of_the_ranks_are_told_beside_what_they_made():
    stage = specs.stage("a.refuse_odd#1")
    async with hosted(spec_of(stage)) as context:
        fired = await context.fire(stage, *firing(rows.part(rows.log_probs([1, 2, 3, 4]))))
        assert [part.shard.sample_ids for part in fired.parts] == [[2], [4]]
        assert fired.failures == [Failure(1, "odd"), Failure(3, "odd")]


async def test_a_worker_that_loses_a_row_is_named():
    stage = specs.stage("a.lose_first#1")
    async with hosted(spec_of(stage)) as context:
        with pytest.raises(ValueError, match=r"a\.lose_first#1: took 1 rows and gave 0; .* samples \[1\]"):
            await context.fire(stage, *firing(rows.part(rows.log_probs([1, 2]))))


async def test_what_a_rank_raises_is_raised():
    stage = specs.stage("a.no_such_method#1")
    async with hosted(spec_of(stage)) as context:
        with pytest.raises(ExceptionGroup) as raised:
            await context.fire(stage, *firing(rows.part(rows.log_probs([1, 2]))))
        assert "no attribute 'no_such_method'" in causes(raised.value)


async def test_measurements_of_the_replicas_are_one_weighted_by_their_rows():
    stage = specs.stage("a.count#1", protocol="METRIC")
    async with hosted(spec_of(stage, topology=Topology(1, 1, 2))) as context:
        fired = await context.fire(stage, *firing(rows.part(rows.log_probs([1, 2, 6]))))
        assert fired.metrics is not None
        assert (fired.metrics.values, fired.metrics.counts) == ({"id": 3.0}, {"id": 3.0})
        assert fired.parts == []


# --- reading in the coordinator


async def test_a_service_reads_what_a_part_names_and_nothing_else():
    async with hosted(SPEC) as context:
        first, second = rows.part(rows.scores([3, 1])), rows.part(rows.scores([2]))
        assert await context.read([first, second], Scores, "edge") == rows.scores([3, 1, 2])
        with pytest.raises(codec.BadFrame, match="other rows than its shard names"):
            await context.read([ShardRef(second.shard, first.payload)], Scores, "edge")


# --- sending


async def send(context: StageContext, *samples: int, dead: tuple[int, ...] = (), stage: StageSpec = SENDING) -> None:
    await context.send(stage, [rows.part(rows.scores(samples))] if samples else [], rows.tombstones(dead))


async def test_every_consumer_gets_all_rows_under_the_name_of_its_own_edge():
    b, c = Consumer("b"), Consumer("c")
    async with hosted(SPEC, b, c) as context:
        await context.send(SENDING_TO_TWO, [rows.part(rows.scores([1, 2]))], rows.tombstones([3]), attempt=2, step=5)
    for consumer, edge in ((b, TO_B.edge), (c, TO_C.edge)):
        ((delivery, batches),) = consumer.arrived
        assert batches == [rows.scores([1, 2])]
        assert (delivery.edge, delivery.failures) == (edge, rows.tombstones([3]))
        assert (delivery.term, delivery.attempt, delivery.step) == (0, 2, 5)


async def test_nothing_is_not_sent():
    b = Consumer("b")
    async with hosted(SPEC, b) as context:
        await send(context)
        assert (b.arrived, len(context.outbox)) == ([], 0)


async def test_a_send_waits_for_the_slowest_and_says_for_whom():
    b, c = Consumer("b"), Consumer("c", is_open=False)
    async with hosted(SPEC, b, c) as context:
        sending = asyncio.create_task(send(context, 1, stage=SENDING_TO_TWO))
        while not b.arrived:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not sending.done()
        assert (context.reports.waits["a.double#1"].what, context.reports.waits["a.double#1"].on) == (
            "credit",
            TO_C.edge,
        )
        c.gate.set()
        await asyncio.wait_for(sending, 60)
        assert context.reports.waits == {}
        last = [notice for notice in await context.reports.notices() if isinstance(notice, Waiting)][-1]
        assert (last.who, last.what) == ("a.double#1", "")


async def test_what_was_sent_is_kept_until_its_prompts_end():
    b = Consumer("b")
    async with hosted(SPEC, b) as context:
        await send(context, sample_id(1, 0), sample_id(2, 0))
        await send(context, dead=(sample_id(2, 1),))
        context.outbox.end([1])
        assert len(context.outbox) == 2, "the first delivery has a row of prompt 2, too"
        context.outbox.end([2])
        assert len(context.outbox) == 0
        assert await context.redeliver(TO_B.edge) == 0
        assert len(b.arrived) == 2


async def test_a_redelivery_sends_one_edge_all_of_it_again_in_order():
    b, c = Consumer("b"), Consumer("c")
    async with hosted(SPEC, b, c) as context:
        await send(context, 1, 2, stage=SENDING_TO_TWO)
        await send(context, 3, dead=(4,), stage=SENDING_TO_TWO)
        assert await context.redeliver(TO_B.edge) == 2
        assert b.samples == [[1, 2], [3, 4], [1, 2], [3, 4]]
        assert b.arrived[:2] == b.arrived[2:]
        assert c.samples == [[1, 2], [3, 4]]


async def test_a_consumer_that_is_gone_leaves_its_rows_in_the_outbox_for_its_successor():
    gone, c, successor = Consumer("b", is_gone=True), Consumer("c"), Consumer("b")
    async with hosted(SPEC, gone, c) as context:
        await asyncio.wait_for(send(context, 1, 2, stage=SENDING_TO_TWO), 60)
        assert c.samples == [[1, 2]], "the others get theirs"
        context.peers = {"b": successor, "c": c}
        await context.redeliver(TO_B.edge)
        assert successor.samples == [[1, 2]]


async def test_whoever_waited_for_a_successor_waits_no_longer_when_it_has_the_rows():
    consumer = Consumer("b", is_gone=True)
    async with hosted(SPEC, consumer) as context:
        await send(context, 1)
        await context.redeliver(TO_B.edge)
        consumer.is_gone = False
        await context.redeliver(TO_B.edge)
        assert context.reports.waits == {}


# --- the device lease


async def test_the_lease_is_asked_for_where_others_share_the_pool_and_always_returned():
    async with hosted(specs.service("a", SENDING, leased=True)) as context:

        async def work() -> None:
            async with context.lease("a.double#1"):
                raise RuntimeError("in the middle of it")

        working = asyncio.create_task(work())
        (asked,) = await context.reports.notices()
        assert isinstance(asked, LeaseAsked)
        assert not working.done()
        context.grant(asked.ticket)
        with pytest.raises(RuntimeError):
            await working
        assert await context.reports.notices() == [LeaseReturned(asked.ticket)]


# --- reporting


async def test_notices_that_nobody_reads_end_the_service_and_not_the_machine():
    async with hosted(SPEC) as context:
        for number in range(MOST_NOTICES):
            context.reports.wait("a.double#1", "rows", f"sender {number}")
        with pytest.raises(RuntimeError, match=f"service a: {MOST_NOTICES} notices"):
            context.reports.wait("a.double#1", "rows")
