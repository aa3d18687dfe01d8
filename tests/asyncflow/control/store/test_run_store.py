"""The run store writes reports about samples to the ledger in a valid order, even if they overtake each other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncflow.control.settings import Checkpoints
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.store.run_log import RunLog
from asyncflow.control.store.run_store import RunStore
from asyncflow.observe.exporter import Exporter
from asyncflow.observe.log import open_log
from protocols.control.events import StepCommitted
from protocols.data.ids import prompt_id, prompt_of, sample_id
from tests.asyncflow.observe.test_exporter import scrape

A, B = sample_id(prompt_id(0, 5), 0), sample_id(prompt_id(0, 3), 0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.db")
    yield opened
    opened.close()


def open_run_store(folder: Path, ledger: Ledger, term: int = 0, restored: str = "") -> RunStore:
    return RunStore(
        folder=folder,
        term=term,
        ledger=ledger,
        checkpoints=Checkpoints(),
        stateful=[],
        recipe_digest="",
        log=RunLog(folder, Exporter("controller"), open_log("")),
        restored=restored,
    )


async def test_a_batch_finds_its_samples_scored_though_a_flush_is_under_way(tmp_path: Path, ledger: Ledger):
    """The watchdog flushes, too; the batch must wait for samples that this flush has taken but not written yet."""
    run_store = open_run_store(tmp_path, ledger)
    await run_store.admit([A, B], 0, 2)
    run_store.generated([A])
    run_store.scored([B])
    await asyncio.gather(run_store.flush(), run_store.batched([B]))
    assert ledger.reasons() == {("generated", ""): 1, ("batched", ""): 1}


async def test_a_generation_that_is_heard_after_its_score_changes_nothing(tmp_path: Path, ledger: Ledger):
    run_store = open_run_store(tmp_path, ledger)
    await run_store.admit([A, B], 0, 2)
    run_store.scored([A])
    await run_store.flush()
    run_store.generated([A, B])
    await run_store.flush()
    assert ledger.reasons() == {("scored", ""): 1, ("generated", ""): 1}


async def test_reports_of_samples_that_have_ended_are_ignored(tmp_path: Path, ledger: Ledger):
    run_store = open_run_store(tmp_path, ledger)
    await run_store.admit([A, B], 0, 2)
    run_store.generated([A])
    run_store.scored([A])
    await run_store.end([(A, "failed", "timeout")])
    await run_store.flush()
    assert ledger.reasons() == {("failed", "timeout"): 1, ("created", ""): 1}


async def test_a_resumed_store_names_the_prompts_to_generate_again_in_the_order_of_their_ids(
    tmp_path: Path, ledger: Ledger
):
    first = open_run_store(tmp_path, ledger)
    await first.admit([A, A + 1, B, B + 1], 0, 2)
    second = open_run_store(tmp_path, ledger, term=1)
    assert second.restarted_prompts() == [prompt_of(B), prompt_of(A)]
    assert second.cursor == 2


async def test_a_checkpoint_holds_a_group_that_ended_or_one_that_did_not_but_never_half_of_it(
    tmp_path: Path, ledger: Ledger
):
    """Half of a group would be generated again as a whole, although its other half has ended."""
    run_store = open_run_store(tmp_path, ledger)
    await run_store.admit([A, A + 1, A + 2], 0, 1)
    written, _ = await asyncio.gather(
        run_store.write_checkpoint({}, 0),
        run_store.end([(A, "failed", "timeout"), (A + 1, "failed", "NaN"), (A + 2, "dropped", "group_incomplete")]),
    )
    assert written is not None
    copy = Ledger(Path(written.path) / "ledger.db")
    assert copy.totals().live in (0, 3)
    copy.close()
    assert run_store.live == []


async def test_the_checkpoint_that_a_run_goes_on_from_is_not_written_again(tmp_path: Path, ledger: Ledger):
    """A crash between the two renames that replace it would leave no checkpoint."""
    first = open_run_store(tmp_path, ledger)
    written = await first.write_checkpoint({}, 0)
    assert written is not None
    resumed = open_run_store(tmp_path, ledger, term=1, restored=written.path)
    assert await resumed.write_checkpoint({}, 0) is None
    assert resumed.last_checkpoint == written.path


async def test_an_abandoned_store_has_written_what_was_under_way(tmp_path: Path, ledger: Ledger):
    run_store = open_run_store(tmp_path, ledger)
    admitting = asyncio.create_task(run_store.admit([A], 0, 1))
    await asyncio.sleep(0)
    admitting.cancel()
    await run_store.abandon()
    reopened = Ledger(tmp_path / "ledger.db")
    assert reopened.live() == [A]
    reopened.close()


async def test_a_step_shows_the_parts_of_its_reward_its_cost_and_what_steers_it(tmp_path: Path, ledger: Ledger):
    run_store = open_run_store(tmp_path, ledger)
    metrics = {"reward.right": 0.5, "reward.liked": 2.0, "cost_mean": 0.25, "multiplier": 1.5, "kl_coefficient": 0.02}
    event = StepCommitted(
        step=1,
        version="0.1",
        seconds=1.0,
        samples=2,
        tokens_generated=8,
        reward_mean=1.0,
        kl=0.1,
        loss=0.1,
        staleness_max=0,
        staleness_mean=0.0,
        metrics=metrics,
    )
    run_store.log.emit(event)
    exporter = run_store.log.exporter
    try:
        families = scrape(exporter.serve())
    finally:
        exporter.close()
    names = ("cost_mean", "cost_multiplier", "kl_coefficient")
    assert [families[f"asyncflow_{name}"].samples[0].value for name in names] == [0.25, 1.5, 0.02]
    parts = families["asyncflow_reward_part_mean"].samples
    assert {sample.labels["part"]: sample.value for sample in parts} == {"right": 0.5, "liked": 2.0}


async def test_samples_whose_rows_are_gone_begin_anew_with_one_attempt_more(tmp_path: Path, ledger: Ledger):
    run_store = open_run_store(tmp_path, ledger)
    await run_store.admit([A, A + 1, B], 0, 2)
    run_store.generated([A, A + 1, B])
    run_store.scored([A])
    await run_store.end([(B, "failed", "timeout")])
    run_store.generated([A])  # reported by the dead generator
    await run_store.regenerate([A, A + 1, B])
    await run_store.flush()
    assert ledger.reasons() == {("created", ""): 2, ("failed", "timeout"): 1}
    run_store.generated([A, A + 1])
    run_store.scored([A + 1])
    await run_store.flush()
    assert ledger.reasons() == {("generated", ""): 1, ("scored", ""): 1, ("failed", "timeout"): 1}


async def test_a_batch_that_is_formed_while_other_rows_are_generated_again_finds_its_samples_scored(
    tmp_path: Path, ledger: Ledger
):
    run_store = open_run_store(tmp_path, ledger)
    await run_store.admit([A, B], 0, 2)

    async def settle() -> None:
        run_store.scored([A])  # made from rows that were believed lost
        await run_store.batched([A])

    await asyncio.gather(run_store.regenerate([A, B]), settle())
    assert ledger.reasons() == {("batched", ""): 1, ("created", ""): 1}
