"""The generation loop with a real engine: what it does between two decoding steps, and in what order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from transformers import PreTrainedModel

from asyncflow.observe.exporter import Exporter
from asyncflow.services.channels.shard_refs import ShardRef
from asyncflow.services.generating_stage import GeneratingStage
from asyncflow.services.generation import GenerationLoop, Job, generate_now
from asyncflow.services.ranks.spec import Limits, ModelSettings, ServiceSpec, StageSpec, Target
from asyncflow.services.runtime.local_store import LocalStore
from asyncflow.services.stage_context import StageContext
from protocols.control.delivery import Delivery
from protocols.control.notices import Generated, LeaseAsked, LeaseReturned, Notice
from protocols.data.columns import concat
from protocols.data.ids import prompt_of
from protocols.data.messages import Prompts, Rollouts, Scores
from protocols.roles import Sampling
from protocols.stage import Failure
from protocols.weights import BadWeights, Version
from tests import tiny
from tests.asyncflow.services import rows
from tests.asyncflow.services.hosting import Consumer
from workers.generation.in_place import InPlaceWeights
from workers.generation.torch import TorchEngine
from workers.settings import Generation, Model
from workers.training.models import load_causal

SAMPLING = Sampling(max_tokens=4)
CONTEXT = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies with different weights."""
    root = tmp_path_factory.mktemp("policies")
    return [tiny.make_policy(root / str(seed), seed=seed, layers=1, context=CONTEXT) for seed in range(2)]


@pytest.fixture(scope="module")
def other(folders: list[Path]) -> PreTrainedModel:
    """The weights that are published while the loop runs."""
    return load_causal(folders[1])


class Bench:
    """A generation loop with its context and engine, and the rows that it has returned."""

    def __init__(self, context: StageContext, engine: TorchEngine, follow: Callable[[], None] | None) -> None:
        self.context, self.engine = context, engine
        self.loop = GenerationLoop(context, engine, follow)
        self.rollouts: list[Rollouts] = []
        self.failures: list[Failure] = []
        self.on_give: Callable[[], None] = lambda: None

    def job(self, prompts: Prompts, sampling: Sampling = SAMPLING, whole: bool = False) -> None:
        """Submit a job whose rows this bench collects."""
        self.loop.submit(Job(prompts, sampling, self._give, whole))

    def _give(self, rollouts: Rollouts | None, failures: list[Failure]) -> None:
        self.rollouts += [rollouts] if rollouts is not None else []
        self.failures += failures
        self.on_give()

    @property
    def given(self) -> int:
        return sum(map(len, self.rollouts)) + len(self.failures)

    def versions(self) -> dict[int, set[int]]:
        """Sample -> versions of its tokens."""
        batch = concat(self.rollouts)
        return {s: set(batch.versions[i].tolist()) for i, s in enumerate(batch.sample_ids.tolist())}

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for a condition; `what` names it in the message of a timeout."""
        try:
            async with asyncio.timeout(60):
                while not reached():
                    await asyncio.sleep(0.002)
        except TimeoutError:
            pytest.fail(f"waited for {what}: {self.given} rows given, {self.loop.waiting} waiting")

    async def all_given(self, count: int) -> None:
        await self.until(lambda: self.given >= count, f"{count} rows")


@asynccontextmanager
async def bench(
    folder: Path,
    *,
    slots: int = 8,
    version: Version | None = Version(0, 0),  # noqa: B008 - frozen
    deterministic: bool = False,
    leased: bool = False,
    follows: Callable[[TorchEngine], None] | None = None,
    run: bool = True,
) -> AsyncIterator[Bench]:
    """A running loop for the policy in `folder`. With `follows` the engine shares a trained model's parameters."""
    settings = Generation(engine="torch", max_tokens=SAMPLING.max_tokens, slots=slots)
    spec = ServiceSpec(
        name="generator",
        settings=ModelSettings("generator", Model(), generation=settings),
        run="test",
        term=0,
        seed=3,
        deterministic=deterministic,
        stages=[],
        pool="main",
        leased=leased,
        samples_per_prompt=1,
        limits=Limits(mailbox_rows=8, firing_rows=8),
    )
    model = load_causal(folder)
    engine = TorchEngine(model, settings, 3, tiny.TOKENS, owns_model=follows is None, version=version)
    context = StageContext(spec, LocalStore(), Exporter(spec.name))
    made = Bench(context, engine, (lambda: follows(engine)) if follows is not None else None)
    running = asyncio.create_task(made.loop.run()) if run else None
    try:
        yield made
        assert running is None or not running.done(), f"the loop ended: {running.exception()!r}"
    finally:
        if running is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        context.close()


def prompts(*texts: str, min_version: int = 0, first: int = 0) -> Prompts:
    made = tiny.make_prompts(texts, first=first)
    return Prompts(
        sample_ids=made.sample_ids,
        prompts=made.prompts,
        references=made.references,
        min_versions=np.full(len(made), min_version, np.int64),
    )


# --- rows and jobs


async def test_rows_come_back_with_their_prompts(folders: list[Path]):
    asked = prompts("1+1=", "2+2=", "3")
    async with bench(folders[0]) as b:
        b.job(asked)
        await b.all_given(3)
    given = concat(b.rollouts)
    given.check()
    assert sorted(given.sample_ids.tolist()) == sorted(asked.sample_ids.tolist())
    for row, sample in enumerate(given.sample_ids.tolist()):
        assert np.array_equal(given.prompts[row], asked.prompts[asked.sample_ids.tolist().index(sample)])


async def test_a_whole_job_is_given_at_once_in_id_order(folders: list[Path]):
    asked = prompts("1+1=", "2+2=", "3", "4", "5")
    async with bench(folders[0], slots=2) as b:
        b.job(asked, whole=True)
        await b.all_given(5)
    assert [r.sample_ids.tolist() for r in b.rollouts] == [sorted(asked.sample_ids.tolist())]


async def test_no_more_rows_run_than_there_are_slots(folders: list[Path]):
    seen: list[int] = []
    async with bench(folders[0], slots=2) as b:
        b.on_give = lambda: seen.append(b.loop.waiting)
        b.job(prompts(*"12345"))
        await b.all_given(5)
    assert seen[0] == 3, "two of five had a slot"


async def test_a_row_that_does_not_fit_fails_alone(folders: list[Path]):
    asked = prompts("1+1=", "1" * CONTEXT, "3")
    async with bench(folders[0]) as b:
        b.job(asked)
        await b.all_given(3)
    assert [f.sample_id for f in b.failures] == [asked.sample_ids[1]]
    assert f"context of {CONTEXT}" in b.failures[0].cause
    assert len(concat(b.rollouts)) == 2


async def test_a_whole_job_of_which_nothing_fits_is_given_as_failures(folders: list[Path]):
    async with bench(folders[0]) as b, asyncio.timeout(60):  # for generate_now
        rollouts, failures = await generate_now(b.loop, prompts("1" * CONTEXT, "2" * CONTEXT), SAMPLING)
    assert rollouts is None
    assert len(failures) == 2


async def test_a_row_that_runs_already_is_refused_and_the_first_job_keeps_it(folders: list[Path]):
    async with bench(folders[0]) as b:
        b.job(prompts("1+1=", "2+2="))
        b.job(prompts("1+1="))
        await b.all_given(3)
    assert len(concat(b.rollouts)) == 2
    assert ["already being generated" in f.cause for f in b.failures] == [True]


async def test_a_call_outside_the_dataflow_waits_for_its_own_rows(folders: list[Path]):
    async with bench(folders[0]) as b, asyncio.timeout(60):  # for generate_now
        b.job(prompts("7", "8", first=5))
        rollouts, failures = await generate_now(b.loop, prompts("1+1=", "2+2="), SAMPLING)
        assert rollouts is not None
        assert rollouts.sample_ids.tolist() == prompts("1+1=", "2+2=").sample_ids.tolist()
        assert failures == []
        assert await generate_now(b.loop, prompts(), SAMPLING) == (None, [])
        await b.all_given(2)


async def test_what_left_the_engine_is_reported(folders: list[Path]):
    async with bench(folders[0]) as b:
        b.job(prompts("1", "2"))
        await b.all_given(2)
    reports = [n for n in await b.context.reports.notices() if isinstance(n, Generated)]
    assert sorted(s for n in reports for s in n.sample_ids) == prompts("1", "2").sample_ids.tolist()
    assert sum(n.tokens for n in reports) == len(concat(b.rollouts).responses.values)


async def test_where_bits_count_two_jobs_never_share_a_forward(folders: list[Path]):
    """Sampled rows and greedy baselines may wait together, and the last bits depend on the shape of a forward pass."""
    async with bench(folders[0], deterministic=True) as b:
        b.job(prompts("1", "2"), whole=True)
        b.job(prompts("3", first=5), replace(SAMPLING, temperature=0.0), whole=True)
        await b.all_given(3)
    generated = [notice.sample_ids for notice in await b.context.reports.notices() if isinstance(notice, Generated)]
    assert generated == [prompts("1", "2").sample_ids.tolist(), prompts("3", first=5).sample_ids.tolist()]


# --- versions


async def test_a_row_waits_for_weights_as_new_as_its_prompt(folders: list[Path], other: PreTrainedModel):
    """A row that waits for newer weights holds no slot, so the other rows run."""
    async with bench(folders[0], slots=1) as b:
        b.job(prompts("1", min_version=1, first=0))
        b.job(prompts("2", "3", min_version=0, first=1))
        await b.all_given(2)
        assert b.loop.waiting == 1
        await b.loop.load(*tiny.publish(other, Version(0, 1)))
        await b.all_given(3)
    assert b.versions() == {int(s): {int(i == 0)} for i, s in enumerate(prompts("1", "2", "3").sample_ids)}


async def test_a_new_term_drops_the_rows_and_waits_for_weights_of_its_own(folders: list[Path], other: PreTrainedModel):
    """Version 0.5 has more steps than 1.3, and belongs to a lineage that is abandoned."""
    async with bench(folders[0], version=Version(0, 5), run=False) as b:
        b.job(prompts("1+1=", "2+2="))
        await b.loop.begin_term(b.context.for_term(1))
        assert (b.loop.waiting, b.engine.unfinished) == (0, 0)
        running = asyncio.create_task(b.loop.run())
        b.job(prompts("7", min_version=3, first=5))
        done, _ = await asyncio.wait({running}, timeout=0.2)
        assert (done, b.given, b.loop.waiting) == (set(), 0, 1), "it does not generate with the old term's weights"
        await b.loop.load(*tiny.publish(other, Version(1, 3)))
        await b.all_given(1)
        running.cancel()
    assert list(b.versions().values()) == [{3}]


async def test_an_engine_without_weights_serves_nothing_until_the_first_load(
    folders: list[Path], other: PreTrainedModel
):
    async with bench(folders[0], version=None) as b:
        b.job(prompts("1"))
        await asyncio.sleep(0.05)
        assert b.given == 0
        receipt = await b.loop.load(*tiny.publish(other, Version(0, 0), probe="1+1=2"))
        await b.all_given(1)
    assert receipt.version == Version(0, 0)
    assert receipt.probe_difference < 1e-3


async def test_a_load_does_not_wait_for_the_rows_that_run(folders: list[Path], other: PreTrainedModel):
    """Six rows, one per step: a load that is requested after the first row is done before the last."""
    loading: list[asyncio.Task[object]] = []
    async with bench(folders[0], slots=1, deterministic=True) as b:

        def load_once() -> None:
            if not loading:
                loading.append(asyncio.create_task(b.loop.load(*tiny.publish(other, Version(0, 1)))))

        b.on_give = load_once
        b.job(prompts(*"123456"))
        await b.all_given(6)
        await loading[0]
    versions_of_rows = [versions for _, versions in sorted(b.versions().items())]
    assert versions_of_rows[0] == {0}
    assert versions_of_rows[-1] == {1}


async def test_weights_that_are_refused_reach_the_asker_and_the_loop_goes_on(
    folders: list[Path], other: PreTrainedModel
):
    manifest, buffer = tiny.publish(other, Version(0, 1))
    damaged = buffer.copy()
    damaged[7] ^= 1
    async with bench(folders[0]) as b, asyncio.timeout(60):  # for two loads and a row
        with pytest.raises(BadWeights, match="bytes received"):
            await b.loop.load(manifest, damaged)
        assert b.engine.version == Version(0, 0)
        await b.loop.load(manifest, buffer)
        with pytest.raises(BadWeights, match=r"version 0\.1 is not newer than 0\.1"):
            await b.loop.load(manifest, buffer)
        b.job(prompts("1"))
        await b.all_given(1)
    assert set.union(*b.versions().values()) == {1}


async def test_loads_are_done_one_after_the_other_in_the_order_of_asking(folders: list[Path], other: PreTrainedModel):
    async with bench(folders[0]) as b, asyncio.timeout(60):  # for both loads
        receipts = await asyncio.gather(*(b.loop.load(*tiny.publish(other, Version(0, v))) for v in (1, 2)))
    assert [r.version.step for r in receipts] == [1, 2]


async def test_an_engine_that_shares_the_trained_model_follows_its_version(folders: list[Path]):
    trained = 0

    def follow(engine: TorchEngine) -> None:
        if engine.version is None or engine.version.step < trained:
            engine.load(InPlaceWeights(Version(0, trained)))

    async with bench(folders[0], follows=follow) as b:
        b.job(prompts("1"))
        await b.all_given(1)
        trained = 2
        b.job(prompts("2", min_version=2, first=1))
        await b.all_given(2)
    assert list(b.versions().values()) == [{0}, {2}]


# --- pause and device lease


async def test_a_paused_loop_draws_nothing_and_still_takes_weights(folders: list[Path], other: PreTrainedModel):
    async with bench(folders[0]) as b:
        b.loop.pause(True)
        b.job(prompts("1", "2"))
        await asyncio.wait_for(b.loop.load(*tiny.publish(other, Version(0, 1))), 60)
        assert (b.given, b.loop.waiting) == (0, 2)
        b.loop.pause(False)
        await b.all_given(2)
    assert set.union(*b.versions().values()) == {1}


async def test_rows_that_run_keep_their_place_through_a_pause(folders: list[Path]):
    async with bench(folders[0], slots=1, deterministic=True) as b:
        b.on_give = lambda: b.loop.pause(b.given == 1)
        b.job(prompts("1", "2", "3"))
        await b.all_given(1)
        await asyncio.sleep(0.05)
        assert (b.given, b.engine.unfinished) == (1, 2)
        b.loop.pause(False)
        await b.all_given(3)
    assert len(b.versions()) == 3


async def test_on_shared_devices_nothing_is_computed_before_the_lease_and_it_is_returned(folders: list[Path]):
    async with bench(folders[0], leased=True) as b:
        notices: list[Notice] = []
        b.job(prompts("1", "2"))
        while not any(isinstance(n, LeaseAsked) for n in notices):
            notices += await asyncio.wait_for(b.context.reports.notices(), 60)
        await asyncio.sleep(0.05)
        assert (b.engine.unfinished, b.given, b.loop.waiting) == (0, 0, 2)
        (asked,) = (n for n in notices if isinstance(n, LeaseAsked))
        b.context.grant(asked.ticket)
        await b.all_given(2)
        while LeaseReturned(asked.ticket) not in notices:
            notices += await asyncio.wait_for(b.context.reports.notices(), 60)
    assert sum(isinstance(n, LeaseAsked) for n in notices) == 1, "one firing a grant"


# --- the stage


STAGE = StageSpec(
    name="policy.generate#1",
    method="generate",
    fires="generate",
    inputs=["policy.generate#1.0"],
    schemas=[Prompts.schema_id],
    sources=["prompts"],
    outputs=[Target("reward", "reward.score#1.0")],
    protocol="3D_ALL_MICRO_DP",
    sampling=SAMPLING,
)


def delivered(*texts: str, first: int = 0, attempt: int = 0) -> tuple[Delivery, list[ShardRef]]:
    """A delivery of prompts as the controller sends it."""
    part = rows.part(prompts(*texts, first=first))
    return Delivery(STAGE.inputs[0], 0, [part.shard], attempt=attempt), [part]


def arrived(consumer: Consumer) -> list[int]:
    """All samples that have arrived, tombstones included, in ascending order of id."""
    return sorted(sample for samples in consumer.samples for sample in samples)


@asynccontextmanager
async def generating(b: Bench, consumer: Consumer) -> AsyncIterator[GeneratingStage]:
    """A running stage that uses a bench's loop."""
    b.context.peers = {consumer.name: consumer}
    stage = GeneratingStage(b.context, STAGE, b.loop)
    sending = asyncio.create_task(stage.run())
    yield stage
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_a_slow_consumer_holds_no_engine_slot(folders: list[Path]):
    consumer = Consumer("reward", is_open=False)
    async with bench(folders[0], slots=2) as b, generating(b, consumer) as stage:
        await stage.deliver(0, *delivered("1", "2", "3", "4", "1" * CONTEXT))
        await b.until(lambda: b.loop.waiting < 4, "the first rows")
        await b.until(lambda: not b.loop.waiting and not b.engine.unfinished, "all rows, though none could be sent")
        assert consumer.arrived == []
        consumer.gate.set()
        await b.until(lambda: len(arrived(consumer)) == 5, "five rows at the consumer")
    assert {d.edge for d, _ in consumer.arrived} == {"reward.score#1.0"}
    generated = concat([batch for _, batches in consumer.arrived for batch in batches])
    assert sorted(generated.sample_ids.tolist()) == prompts(*"1234").sample_ids.tolist()
    assert [len(d.failures) for d, _ in consumer.arrived if d.failures] == [1], "its tombstone travels in its place"


async def test_while_a_batch_is_generated_nobody_waits_and_its_tokens_are_reported(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """A stage that said "waits for rows" would be blamed for a stall, and a long batch would look like one."""
    reached, go_on = threading.Event(), threading.Event()
    consumer = Consumer("reward")
    async with bench(folders[0]) as b, generating(b, consumer) as stage:
        forward = b.engine._next_logits

        def gated(*arguments: Any) -> Any:
            if b.engine.tokens:
                reached.set()
                go_on.wait(60)
            return forward(*arguments)

        monkeypatch.setattr(b.engine, "_next_logits", gated)
        await b.until(lambda: waits(b) == "rows on prompts", "the first wait")
        await stage.deliver(0, *delivered("1", "2"))
        await b.until(reached.is_set, "the first token")
        b.context.reports._notices.clear()
        assert waits(b) == ""
        b.loop.note_progress()
        assert await b.context.reports.notices() == [Generated([], 2)]
        go_on.set()
        await b.until(lambda: len(arrived(consumer)) == 2, "both rows")
        await b.until(lambda: waits(b) == "rows on prompts", "the wait for more rows")


async def test_rows_that_are_too_new_for_the_weights_wait_for_weights(folders: list[Path]):
    consumer = Consumer("reward")
    async with bench(folders[0], version=None) as b, generating(b, consumer) as stage:
        await stage.deliver(0, *delivered("1"))
        await b.until(lambda: waits(b) == "weights on policy", "its wait for weights")


def waits(b: Bench) -> str:
    """What the stage waits for."""
    waiting = b.context.reports.waits.get(STAGE.name)
    return f"{waiting.what} on {waiting.on}" if waiting else ""


async def test_a_prompt_that_is_delivered_twice_is_generated_once(folders: list[Path]):
    consumer = Consumer("reward")
    async with bench(folders[0]) as b, generating(b, consumer) as stage:
        await stage.deliver(0, *delivered("1", "2"))
        await stage.deliver(0, *delivered("1", "2"))
        await b.until(lambda: len(arrived(consumer)) == 2, "both rows")
        await stage.deliver(0, *delivered("2", "3", first=1))
        await b.until(lambda: len(arrived(consumer)) == 3, "the one row that is new")
        assert not b.engine.unfinished
        assert b.context.counts.statistics(STAGE.inputs[0], 0, 0, 0).refused == 3
    assert arrived(consumer) == prompts(*"123").sample_ids.tolist()


async def test_a_prompt_whose_row_was_lost_is_generated_again_in_a_new_attempt(folders: list[Path]):
    consumer = Consumer("reward")
    async with bench(folders[0]) as b, generating(b, consumer) as stage:
        await stage.deliver(0, *delivered("1"))
        await b.until(lambda: len(arrived(consumer)) == 1, "the first attempt")
        await stage.deliver(0, *delivered("1", attempt=1))
        await b.until(lambda: len(arrived(consumer)) == 2, "the second attempt")
    assert [delivery.attempt for delivery, _ in consumer.arrived] == [0, 1]


async def test_a_prompt_that_has_ended_is_not_generated(folders: list[Path]):
    consumer, (first, second) = Consumer("reward"), prompts("1", "2").sample_ids.tolist()
    async with bench(folders[0]) as b, generating(b, consumer) as stage:
        await stage.end([prompt_of(first)])
        await stage.deliver(0, *delivered("1", "2"))
        await b.until(lambda: bool(arrived(consumer)), "the other prompt's row")
        assert (b.engine.unfinished, b.loop.waiting) == (0, 0)
    assert arrived(consumer) == [second]


async def test_prompts_that_can_not_be_read_are_tombstones_with_the_reason(folders: list[Path]):
    consumer = Consumer("reward")
    async with bench(folders[0]) as b, generating(b, consumer) as stage:
        delivery, (part,) = delivered("1", "2")
        await stage.deliver(0, delivery, [ShardRef(part.shard, rows.damaged(part.payload))])
        await b.until(lambda: len(arrived(consumer)) == 2, "two tombstones")
    ((sent, batches),) = consumer.arrived
    assert batches == []
    assert all("its frame was refused" in failure.cause for failure in sent.failures)


async def test_a_generating_stage_takes_prompts(folders: list[Path]):
    async with bench(folders[0], run=False) as b:
        with pytest.raises(ValueError, match=r"policy.generate#1: takes prompts, its edge carries schema 5"):
            stage = GeneratingStage(b.context, replace(STAGE, schemas=[Scores.schema_id]), b.loop)
            await stage.deliver(0, *delivered("1"))
