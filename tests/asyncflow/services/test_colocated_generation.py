"""Generation by the ranks that train: switch, generate and switch back, with no other work of the ranks in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from asyncflow.observe.exporter import Exporter
from asyncflow.services.channels.endpoint import Payload
from asyncflow.services.channels.shard_refs import ShardRef, pack
from asyncflow.services.colocated_generation import ColocatedGeneratingStage, ColocatedGeneration, replicas_of
from asyncflow.services.ranks.spec import ModelSettings, ServiceSpec, Target
from asyncflow.services.runtime.local_store import LocalStore
from asyncflow.services.stage_context import StageContext
from protocols.control.delivery import Delivery, RankCall, RankReply
from protocols.control.notices import Busy, Generated
from protocols.control.replies import Done, RankAnswer
from protocols.control.requests import RankRequest, SwitchLayout
from protocols.data.messages import Prompts
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.roles import Sampling
from protocols.stage import Failure
from tests import tiny
from tests.asyncflow.services import rows, specs
from tests.asyncflow.services.hosting import Consumer
from workers.settings import Generation, Model

SAMPLING = Sampling(max_tokens=3)
EDGE, TO_B = "policy.generate#1.0", Target("b", "b.score#1.0")
STAGE = replace(
    specs.stage("policy.generate#1", protocol="3D_ALL_MICRO_DP", outputs=[TO_B]),
    schemas=[Prompts.schema_id],
    sampling=SAMPLING,
)
TOOK = {"seconds": 0.5, "received_bytes": 64.0, "peak_bytes": 128.0, "copied_bytes": 0.0}
BACK_AND_FORTH = ["generation", "generate", "training"]


def spec(slots: int = 256, **changes: Any) -> ServiceSpec:
    settings = ModelSettings("policy", Model(), generation=Generation(slots=slots))
    return specs.service("policy", STAGE, topology=Topology(1, 2, 2), collective=True, settings=settings, **changes)


class FakeRanks:
    """Four ranks that record their work: two tokens per row; rows with odd ids fail. Implements `Ranks`."""

    def __init__(self, store: LocalStore) -> None:
        self.done: list[list[str]] = [[] for _ in range(4)]
        self.rows: list[list[int]] = [[] for _ in range(4)]
        self.gate = asyncio.Event()
        self.gate.set()
        self.raises: Exception | None = None
        self.took = TOOK  # the report of a switch to generation; empty where no weights were moved
        self._store = store

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        assert (call.method, call.sampling) == ("generate", SAMPLING)
        self.done[rank].append("generate")
        self.rows[rank] += call.sample_ids
        await self.gate.wait()
        if self.raises is not None:
            raise self.raises
        good = [sample for sample in call.sample_ids if sample % 2 == 0]
        failures = [Failure(sample, "odd") for sample in call.sample_ids if sample % 2]
        parts = [pack(self._store, rows.rollouts(good), 0)] if good else []
        reply = RankReply(0.0, 1.0, [0], [part.shard for part in parts], failures, generated_tokens=2 * len(good))
        return reply, [part.payload for part in parts]

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        assert isinstance(request, SwitchLayout)
        self.done[rank].append(request.to)
        return RankAnswer(0.0, 0.5, Done(self.took if request.to == "generation" else {})), []


class Bench:
    """A stage, its ranks and the consumer of its rows."""

    def __init__(self, **changes: Any) -> None:
        self.store = LocalStore()
        self.context = StageContext(spec(**changes), self.store, Exporter("policy"))
        self.ranks, self.consumer = FakeRanks(self.store), Consumer("b")
        self.context.ranks, self.context.peers = self.ranks, {"b": self.consumer}
        self.generation = ColocatedGeneration(self.context)
        self.stage = ColocatedGeneratingStage(self.context, STAGE, self.generation)

    async def deliver(self, *samples: int) -> int:
        """Deliver prompts, and return how many were refused."""
        prompts = replace(tiny.make_prompts(["1+1="] * len(samples)), sample_ids=np.array(samples, np.int64))
        part = pack(self.store, prompts, 0)
        return await self.stage.accept(0, Delivery(EDGE, 0, [part.shard]), [ShardRef(part.shard, part.payload)])

    async def until(self, delivered: int) -> None:
        """Wait until the consumer has received this many rows and tombstones."""
        async with asyncio.timeout(60):
            while sum(map(len, self.consumer.samples)) < delivered:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[Bench]:
    bench = Bench(**changes)
    task = asyncio.create_task(bench.stage.run())
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        bench.context.close()
        bench.store.close()


def test_the_copies_that_generate_follow_from_both_layouts():
    assert replicas_of(GenerationGrouping(Topology(1, 2, 2), 1, 1)) == 4
    assert replicas_of(GenerationGrouping(Topology(1, 4, 2), 1, 2)) == 4
    assert replicas_of(GenerationGrouping(Topology(2, 2, 1), 2, 2)) == 1


async def test_rows_are_dealt_to_all_copies_between_two_switches_and_leave_in_order():
    async with running() as bench:
        await bench.deliver(0, 2, 4, 6, 8)
        await bench.until(5)
        assert bench.ranks.done == [BACK_AND_FORTH] * 4
        assert bench.ranks.rows == [[0, 2], [4], [6], [8]]
        assert bench.consumer.samples == [[0, 2, 4, 6, 8]]


async def test_a_copy_without_rows_switches_and_draws_nothing():
    async with running() as bench:
        await bench.deliver(2)
        await bench.until(1)
        assert bench.ranks.done == [BACK_AND_FORTH] * 4
        assert bench.ranks.rows == [[2], [], [], []]


async def test_a_row_that_can_not_be_drawn_is_a_tombstone():
    async with running() as bench:
        await bench.deliver(2, 3)
        await bench.until(2)
        (delivery, _), *_ = bench.consumer.arrived
        assert delivery.failures == [Failure(3, "odd")]


async def test_a_prompt_that_is_sent_again_is_not_drawn_again():
    async with running() as bench:
        await bench.deliver(2, 4)
        await bench.until(2)
        assert await bench.deliver(2, 4) == 2


async def test_a_firing_takes_as_many_rows_as_the_copies_have_slots_and_all_where_the_wave_must_be_whole():
    for deterministic, firings in ((False, [4, 2]), (True, [6])):
        async with running(slots=1, deterministic=deterministic) as bench:
            await bench.deliver(0, 2, 4, 6, 8, 10)
            await bench.until(6)
            assert [len(samples) for samples in bench.consumer.samples] == firings


async def test_what_a_switch_took_is_told_with_the_next_step_and_the_tokens_are_counted():
    async with running() as bench:
        await bench.deliver(2, 4)
        await bench.until(2)
        assert bench.context.reports.take_measured() == {f"transition.{name}": value for name, value in TOOK.items()}
        assert bench.context.reports.take_measured() == {}, "once"
        notices = await bench.context.reports.notices()
        assert [notice for notice in notices if isinstance(notice, Generated)] == [Generated([2, 4], 4)]
        spans = [span.activity for notice in notices if isinstance(notice, Busy) for span in notice.spans]
        assert spans == ["to_generation", "policy.generate#1", "to_training"]


async def test_a_switch_that_had_nothing_to_bring_leaves_what_the_last_one_took():
    async with running() as bench:
        await bench.deliver(2)
        await bench.until(1)
        bench.ranks.took = {}
        await bench.deliver(4)
        await bench.until(2)
        assert bench.context.reports.take_measured() == {f"transition.{name}": value for name, value in TOOK.items()}


async def test_nothing_else_is_asked_of_the_ranks_while_they_generate():
    async with running() as bench:
        bench.ranks.gate.clear()
        await bench.deliver(2)
        while "generate" not in bench.ranks.done[0]:
            await asyncio.sleep(0.001)

        async def snapshot() -> None:
            async with bench.context.collective.exclusive():
                bench.ranks.done[0].append("snapshot")

        task = asyncio.create_task(snapshot())
        await asyncio.sleep(0.01)
        bench.ranks.gate.set()
        await task
        assert bench.ranks.done[0] == [*BACK_AND_FORTH, "snapshot"]


async def test_a_pause_lets_a_draw_finish_and_begins_no_other():
    async with running() as bench:
        bench.ranks.gate.clear()
        await bench.deliver(2)
        while "generate" not in bench.ranks.done[0]:
            await asyncio.sleep(0.001)
        bench.generation.pause(True)
        bench.ranks.gate.set()
        await bench.until(1)
        await bench.deliver(4)
        await asyncio.sleep(0.01)
        assert bench.consumer.samples == [[2]]
        bench.generation.pause(False)
        await bench.until(2)


async def test_what_comes_in_a_pause_waits_for_its_end():
    async with running() as bench:
        bench.generation.pause(True)
        await bench.deliver(2)
        await asyncio.sleep(0.01)
        assert bench.ranks.done[0] == []
        bench.generation.pause(False)
        await bench.until(1)


async def test_after_a_fault_that_all_ranks_report_they_train_again():
    bench = Bench()
    bench.ranks.raises = ValueError("no memory")
    prompts = pack(bench.store, tiny.make_prompts(["1+1="]), 0)
    samples = prompts.shard.sample_ids
    with pytest.raises(ValueError, match="no memory"):
        await bench.generation.generate(STAGE, samples, [[(prompts, 0)]], SAMPLING)
    assert bench.ranks.done == [BACK_AND_FORTH] * 4
