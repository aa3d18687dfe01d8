"""The stages: when each of them fires, how it handles unreadable rows, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from asyncflow.services.channels.endpoint import causes
from asyncflow.services.channels.lost_rows import MOST_TIMES
from asyncflow.services.channels.shard_refs import ShardRef
from asyncflow.services.ranks.spec import StageSpec, Target
from asyncflow.services.stage_context import StageContext
from asyncflow.services.stages import ClosingStage, RowStage, StageRunner, TrainingStage, read_or_fail
from protocols.control.delivery import Delivery
from protocols.control.notices import Notice, PromptSettled, RowsLost, StepDone, Waiting
from protocols.control.replies import BatchClosed
from protocols.control.requests import CloseBatch
from protocols.data.ids import prompt_of, sample_id
from protocols.data.messages import LogProbs, Metrics
from protocols.layout.topology import Topology
from protocols.stage import Measured
from tests.asyncflow.services import rows, specs
from tests.asyncflow.services.hosting import Consumer, SomeAreGone, hosted

TO_B = Target("b", "b.double#1.0")
DOUBLE = specs.stage("a.double#1", outputs=[TO_B])
ADD = specs.stage("a.add#1", sources=("x.double#1", "y.double#1"), outputs=[TO_B])
TRAIN = specs.stage("a.count#1", fires="batch", protocol="METRIC")
CLOSE = specs.stage("a.keep#1", sources=("x.double#1",), outputs=[TO_B], fires="closed", grains=["sample"])


async def deliver(
    stage: StageRunner, *parts: ShardRef, dead: Sequence[int] = (), position: int = 0, attempt: int = 0, step: int = -1
) -> None:
    shards = [part.shard for part in parts]
    edge = stage.spec.inputs[position]
    await stage.deliver(position, Delivery(edge, 0, shards, rows.tombstones(dead), attempt, step), list(parts))


def sent(*samples: int) -> ShardRef:
    return rows.part(rows.log_probs(samples))


def torn(*samples: int) -> ShardRef:
    part = sent(*samples)
    return ShardRef(part.shard, rows.damaged(part.payload))


def lost(*samples: int) -> ShardRef:
    return ShardRef(sent(*samples).shard, None)


async def until_sent(consumer: Consumer, deliveries: int = 1) -> list[list[int]]:
    """Wait for a number of deliveries, and return the samples of each."""
    try:
        async with asyncio.timeout(60):
            while len(consumer.arrived) < deliveries:
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail(f"{len(consumer.arrived)} of {deliveries} deliveries were sent: {consumer.samples}")
    return consumer.samples


@asynccontextmanager
async def row_stage(stage: StageSpec = DOUBLE, **changes: Any) -> AsyncIterator[tuple[RowStage, Consumer]]:
    """A running row stage and the consumer of its rows."""
    consumer = Consumer("b")
    async with hosted(specs.service("a", stage, **changes), consumer, store=SomeAreGone()) as context:
        runner = RowStage(context, stage)
        running = asyncio.create_task(runner.run())
        yield runner, consumer
        if running.done():
            await running  # raises the error that ended it
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


# --- row stages


async def test_rows_leave_as_they_come_and_tombstones_are_passed_on():
    async with row_stage() as (stage, consumer):
        await deliver(stage, sent(1, 2), dead=[3])
        assert await until_sent(consumer) == [[1, 2, 3]]
        assert consumer.arrived[0][0].failures == rows.tombstones([3])


async def test_tombstones_alone_fire_nothing_and_are_passed_on():
    async with row_stage() as (stage, consumer):
        await deliver(stage, dead=[3])
        assert await until_sent(consumer) == [[3]]
        assert consumer.arrived[0][1] == []


async def test_a_join_fires_on_rows_that_both_inputs_have():
    async with row_stage(ADD) as (stage, consumer):
        await deliver(stage, sent(1, 2, 3), position=0)
        await deliver(stage, sent(3), sent(1), position=1)
        assert await until_sent(consumer) == [[3, 1]]
        ((_, (batch,)),) = consumer.arrived
        assert isinstance(batch, LogProbs)
        assert [values[0] for values in batch.log_probs] == [-6, -2]


async def test_a_firing_takes_no_more_rows_than_the_service_says():
    async with row_stage(firing_rows=2) as (stage, consumer):
        await deliver(stage, sent(1, 2, 3))
        assert await until_sent(consumer, 2) == [[1, 2], [3]]


async def test_a_refused_frame_leaves_as_tombstones_and_the_stage_goes_on():
    async with row_stage() as (stage, consumer):
        await deliver(stage, sent(1), torn(2, 3))
        assert await until_sent(consumer) == [[1, 2, 3]]
        dead = consumer.arrived[0][0].failures
        assert [f.sample_id for f in dead] == [2, 3]
        assert all("its frame was refused" in f.cause for f in dead)
        await deliver(stage, sent(4))
        assert await until_sent(consumer, 2) == [[1, 2, 3], [4]]


async def test_a_row_whose_bytes_are_gone_again_and_again_leaves_as_a_tombstone():
    """Its sender lives but keeps sending a reference to freed memory: the prompt fails, and the run goes on."""
    async with row_stage() as (stage, consumer):
        async with asyncio.timeout(60):
            while not consumer.arrived:  # a delivery before the last one is taken back counts as a duplicate
                await deliver(stage, lost(2))
                await asyncio.sleep(0.01)
        assert await until_sent(consumer) == [[2]]
        assert "bytes were gone" in consumer.arrived[0][0].failures[0].cause
        asked = [notice for notice in await stage.context.reports.notices() if isinstance(notice, RowsLost)]
        assert len(asked) == MOST_TIMES - 1
        assert len(stage.context.lost_rows) == 1
        stage.context.lost_rows.end([prompt_of(2)])
        assert len(stage.context.lost_rows) == 0


async def test_rows_whose_bytes_are_gone_leave_nothing_and_can_be_sent_again():
    async with row_stage() as (stage, consumer):
        await deliver(stage, sent(1), lost(2, 3))
        assert await until_sent(consumer) == [[1]]
        await deliver(stage, sent(1, 2, 3))
        assert await until_sent(consumer, 2) == [[1], [2, 3]]


async def test_regenerated_rows_replace_those_whose_bytes_are_gone():
    """The sender's successor sends them before their loss is noticed."""
    async with row_stage() as (stage, consumer):
        await deliver(stage, lost(1, 2))
        await deliver(stage, sent(1, 2), attempt=1)
        assert await until_sent(consumer) == [[1, 2]]
        assert stage.depth()[0] == 0


async def test_regenerated_rows_keep_their_attempt():
    async with row_stage() as (stage, consumer):
        await deliver(stage, sent(1))
        await until_sent(consumer)
        await deliver(stage, sent(1), attempt=1)
        await until_sent(consumer, 2)
        assert [delivery.attempt for delivery, _ in consumer.arrived] == [0, 1]


async def test_what_comes_again_or_late_is_refused_and_counted():
    async with row_stage() as (stage, consumer):
        await deliver(stage, sent(1, 2))
        await until_sent(consumer)
        await deliver(stage, sent(2, 3))
        await until_sent(consumer, 2)
        await stage.end([0])
        await deliver(stage, sent(4), dead=[5])
        edge = stage.context.counts.statistics("a.double#1.0", *stage.depth())
        assert (edge.rows, edge.refused, edge.depth) == (3, 3, 0)


# --- the closing stage


def keep(batch: LogProbs, scale: float = 1.0) -> Measured[LogProbs]:
    return Measured(batch, Metrics(values={"rows": scale * len(batch)}))


async def noticed(context: StageContext) -> list[Notice]:
    """The notices that are pending."""
    context.reports.wait("test")  # so that `notices` returns
    return await context.reports.notices()


async def settled(context: StageContext) -> list[PromptSettled]:
    return [notice for notice in await noticed(context) if isinstance(notice, PromptSettled)]


@asynccontextmanager
async def closing_stage(
    function: Callable[..., Any] = keep, **changes: Any
) -> AsyncIterator[tuple[ClosingStage, Consumer]]:
    consumer = Consumer("b")
    async with hosted(specs.service("a", CLOSE, **changes), consumer, store=SomeAreGone()) as context:
        yield ClosingStage(context, CLOSE, function), consumer


async def test_settled_prompts_are_reported_once():
    async with closing_stage(samples_per_prompt=2) as (stage, _):
        first, second, third = sample_id(1, 0), sample_id(1, 1), sample_id(2, 0)
        await deliver(stage, sent(first, third))
        assert await settled(stage.context) == []
        await deliver(stage, sent(second))
        await deliver(stage, sent(second))
        assert [s.alive for s in await settled(stage.context)] == [[first, second]]
        assert stage.depth()[0] == 3


def has_spread(batch: LogProbs) -> list[bool]:
    """Whether the rows of a prompt differ in their first token."""
    return [len({float(values[0]) for values in batch.log_probs}) > 1] * len(batch)


async def test_prompts_that_the_filter_drops_are_reported_and_held_no_longer():
    spec = replace(CLOSE, filter="has_spread", filter_inputs=[0])
    async with hosted(specs.service("a", spec, samples_per_prompt=2), Consumer("b")) as context:
        stage = ClosingStage(context, spec, keep, has_spread)
        useful, useless = [sample_id(1, i) for i in range(2)], [sample_id(2, i) for i in range(2)]
        flat = rows.log_probs(useless)
        flat = replace(flat, log_probs=flat.log_probs.with_values(0 * flat.log_probs.values))
        await deliver(stage, sent(*useful), rows.part(flat))
        assert {s.prompt_id: (s.alive, s.trainable) for s in await settled(context)} == {
            1: (useful, True),
            2: (useless, False),
        }
        assert stage.depth()[0] == 2
        assert await stage.close(CloseBatch(0, useful)) == BatchClosed({"rows": 2.0})


async def test_a_filter_that_raises_is_named():
    def broken(batch: LogProbs) -> list[bool]:
        raise KeyError("scores")

    spec = replace(CLOSE, filter="broken", filter_inputs=[0])
    async with hosted(specs.service("a", spec), Consumer("b")) as context:
        with pytest.raises(ValueError, match=r"a\.keep#1: broken of prompt 3 raised KeyError: 'scores'"):
            await deliver(ClosingStage(context, spec, keep, broken), sent(sample_id(3, 0)))


async def test_a_closed_batch_is_made_in_the_order_asked_for_and_sent_with_its_step():
    async with closing_stage(partial(keep, scale=10.0)) as (stage, consumer):
        samples = [sample_id(prompt, 0) for prompt in (1, 2, 3)]
        await deliver(stage, sent(*samples))
        asked = [samples[2], samples[0]]
        assert await stage.close(CloseBatch(4, asked)) == BatchClosed({"rows": 20.0})
        ((delivery, batches),) = consumer.arrived
        assert (delivery.step, batches) == (4, [rows.log_probs(asked)])


async def test_a_batch_that_its_process_has_not_joined_yet_is_closed_when_its_rows_have_come_again():
    """As in the successor of one that died while the batch was closed."""
    async with closing_stage() as (stage, _):
        first, second = sample_id(1, 0), sample_id(2, 0)
        closing = asyncio.create_task(stage.close(CloseBatch(4, [first, second])))
        await deliver(stage, sent(first))
        await asyncio.sleep(0)
        assert not closing.done()
        waits = [notice for notice in await noticed(stage.context) if isinstance(notice, Waiting)]
        assert (CLOSE.name, "rows again") in [(wait.who, wait.what) for wait in waits]
        await deliver(stage, sent(second))
        assert await closing == BatchClosed({"rows": 2.0})


async def test_a_refused_shard_is_tombstones_at_the_join_and_costs_no_other():
    async with closing_stage() as (stage, _):
        good, bad = sample_id(1, 0), sample_id(2, 0)
        await deliver(stage, torn(bad), sent(good))
        reported = {s.prompt_id: s for s in await settled(stage.context)}
        assert reported[1].alive == [good]
        (dead,) = reported[2].dead
        assert dead.sample_id == bad
        assert "its frame was refused: rows 0 to 0 are damaged" in dead.cause
        assert stage.context.counts.statistics("a.keep#1.0", 0, 0, 0).damaged == 1


async def test_a_shard_that_is_gone_is_awaited_from_its_senders_successor():
    async with closing_stage() as (stage, _):
        await deliver(stage, lost(sample_id(1, 0)))
        assert await settled(stage.context) == []
        await deliver(stage, sent(sample_id(1, 0)))
        assert len(await settled(stage.context)) == 1


async def test_a_shard_that_is_not_what_it_is_said_to_be_is_refused():
    async with closing_stage() as (stage, _):
        named, foreign = sent(1, 2), rows.part(rows.scores([1, 2]))
        for payload, reason in ((foreign.payload, "unknown schema 5"), (sent(1).payload, "other rows")):
            batch, failures = await read_or_fail(stage.context, ShardRef(named.shard, payload), LogProbs, "a.keep#1.0")
            assert batch is None
            assert [f.sample_id for f in failures] == [1, 2]
            assert all(reason in f.cause for f in failures)


# --- training stages


@asynccontextmanager
async def training_stage() -> AsyncIterator[tuple[TrainingStage, asyncio.Task[None]]]:
    async with hosted(specs.service("a", TRAIN, topology=Topology(1, 1, 2)), store=SomeAreGone()) as context:
        runner = TrainingStage(context, TRAIN)
        running = asyncio.create_task(runner.run())
        yield runner, running
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until_done(context: StageContext, steps: int) -> list[StepDone]:
    done: list[StepDone] = []
    async with asyncio.timeout(60):
        while len(done) < steps:
            done += [notice for notice in await context.reports.notices() if isinstance(notice, StepDone)]
    return done


async def test_a_closed_batch_is_trained_once_by_all_replicas_together():
    async with training_stage() as (stage, _):
        await deliver(stage, sent(1, 2, 6), step=0)
        await deliver(stage, sent(1, 2, 6), step=0)
        await deliver(stage, sent(4), step=1)
        assert await until_done(stage.context, 2) == [
            StepDone("a.count#1", 0, {"id": 3.0}),
            StepDone("a.count#1", 1, {"id": 4.0}),
        ]
        assert stage.context.counts.statistics("a.count#1.0", 0, 0, 0).refused == 3


@pytest.mark.parametrize(("bad", "cause"), [(torn, "its frame was refused"), (lost, "their sender is gone")])
async def test_a_batch_of_which_a_row_can_not_be_read_is_no_batch(bad: Callable[..., ShardRef], cause: str):
    async with training_stage() as (stage, running):
        await deliver(stage, sent(1), bad(2), step=3)
        await asyncio.wait([running], timeout=60)
        error = running.exception()
        assert error is not None
        assert f"step 3 has rows that can't be read: {cause}" in causes(error)


async def test_a_batch_has_no_tombstones():
    async with training_stage() as (stage, _):
        for parts in ([], [sent(1)]):
            with pytest.raises(ValueError, match="a closed batch has rows and no tombstones"):
                await deliver(stage, *parts, dead=[2], step=0)
