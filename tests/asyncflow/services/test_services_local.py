"""Services in one process: rows pass through a pipeline exactly once, despite damaged frames and a restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from asyncflow.services.channels.shard_refs import ShardRef
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of
from tests.asyncflow.services import rows
from tests.asyncflow.services.chain import A_EDGE, B_EDGE, C_EDGE, Chain, local_chain, samples_of


def alive(chain: Chain) -> list[int]:
    """The samples that settled with a value, in ascending order, repeated if they settled twice."""
    return sorted(sample for settled in chain.settled for sample in settled.alive)


async def test_every_row_arrives_once_and_went_through_both():
    samples = samples_of(*range(20))
    async with local_chain() as c:
        await c.send(c.put(rows.log_probs(samples[:7])), c.put(rows.log_probs(samples[7:])))
        await c.until_settled(20)
        assert alive(c) == samples
        assert await c.values(samples) == {sample: -4.0 * sample for sample in samples}


async def test_what_the_source_sends_again_changes_nothing():
    samples = samples_of(*range(8))
    async with local_chain() as c:
        part = c.put(rows.log_probs(samples))
        await c.send(part)
        await c.send(part)
        await c.until_settled(8)
        await c.send(part)
        assert (await c.edge(A_EDGE)).refused == 16
        for edge in (B_EDGE, C_EDGE):
            assert (await c.edge(edge)).rows == 8
        assert Counter(alive(c)) == Counter(samples)


@pytest.mark.parametrize("mailbox_rows", [1024, 4], ids=["with room", "while its sender waits for credit"])
async def test_a_service_that_restarts_in_the_middle_is_sent_all_of_it_again_and_nothing_doubles(mailbox_rows: int):
    samples = samples_of(*range(24))
    slowly = {"firing_rows": 2, "mailbox_rows": mailbox_rows, "delay_seconds": {"double": 0.02}}
    async with local_chain(a={"firing_rows": 8}, b=slowly) as c:
        await c.send(c.put(rows.log_probs(samples)))
        await c.until_settled(6)
        await c.restart("b")
        assert len(c.settled) < len(samples), "it was over before it was restarted"
        await c.redeliver(B_EDGE)
        await c.until_settled(24)
        assert Counter(alive(c)) == Counter(samples)
        assert await c.values(samples) == {sample: -4.0 * sample for sample in samples}
        assert (await c.edge(C_EDGE)).refused >= 6, "the successor did again what its predecessor had done"


class Unknown(Batch, frozen=True, kw_only=True, eq=False):
    """A message type that is not registered."""

    schema_id: ClassVar[int] = 99


def damaged(c: Chain, samples: Sequence[int]) -> ShardRef:
    part = c.put(rows.log_probs(samples))
    return ShardRef(part.shard, rows.damaged(part.payload))


def unknown(c: Chain, samples: Sequence[int]) -> ShardRef:
    return c.put(Unknown(sample_ids=rows.log_probs(samples).sample_ids))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(damaged, "the checksum of block 0 differs"), (unknown, "unknown schema 99, version 1")],
)
@pytest.mark.parametrize("edge", [A_EDGE, B_EDGE, C_EDGE], ids=["to many ranks", "to one rank", "to a join"])
async def test_a_frame_that_is_refused_becomes_tombstones_with_the_reason_and_the_service_lives_on(
    make: Callable[[Chain, Sequence[int]], ShardRef], reason: str, edge: str, tmp_path: Path
):
    good, bad, later = samples_of(1, 2), samples_of(3, 4), samples_of(5)
    logs = {"log_path": str(tmp_path / "logs" / "service.log")}
    async with local_chain(a=logs, b=logs) as c:
        await c.send(c.put(rows.log_probs(good)), make(c, bad), to=edge)
        await c.until_settled(4)
        dead = [failure for settled in c.settled for failure in settled.dead]
        assert sorted(failure.sample_id for failure in dead) == bad
        assert all(reason in failure.cause for failure in dead)
        assert (await c.edge(edge)).damaged == 2
        await c.send(c.put(rows.log_probs(later)))
        await c.until_settled(5)
        assert alive(c) == good + later
    kept = list((tmp_path / "logs").glob("quarantine/*.txt"))
    assert all(reason in path.read_text() for path in kept)
    assert bool(kept) == (edge != C_EDGE), "c was given no folder"


# --- statistics


async def test_statistics_say_what_passed_each_channel_and_which_rank_read_how_much():
    samples = samples_of(*range(8))
    async with local_chain() as c:
        part = c.put(rows.log_probs(samples, tokens=100))
        await c.send(part)
        await c.until_settled(8)
        a, b, end = [await c.edge(edge) for edge in (A_EDGE, B_EDGE, C_EDGE)]
        assert [(edge.rows, edge.refused, edge.damaged) for edge in (a, b, end)] == [(8, 0, 0)] * 3
        assert a.read_bytes == dict.fromkeys(range(4), part.shard.nbytes), "a small frame is one block"
        assert sorted(b.read_bytes) == [0]
        assert (a.capacity, b.capacity, end.capacity) == (1024, 1024, 0)
        assert (await c.statistics("a")).ranks == 4


async def test_statistics_say_who_waits_on_whom(tmp_path: Path):
    held = {"options": {"folder": str(tmp_path), "gate": "open"}, "mailbox_rows": 2, "firing_rows": 2}
    async with local_chain(a={"firing_rows": 2}, b=held) as c:
        for start in range(0, 8, 2):
            await c.send(c.put(rows.log_probs(samples_of(start, start + 1))))
        await c.until("a", f"credit on {B_EDGE}", depth=2)
        assert (await c.statistics("b")).waits == {}, "it works"
        (tmp_path / "open").touch()
        await c.until_settled(8)
        await c.until("a", "rows on source", depth=0)
        await c.until("b", "rows on a.double#1", depth=0)
        assert (await c.edge(B_EDGE)).wait_seconds > 0


async def test_what_is_kept_for_others_is_let_go_when_its_prompts_end():
    samples = samples_of(1, 2)
    async with local_chain() as c:
        await c.send(c.put(rows.log_probs(samples)))
        await c.until_settled(2)
        assert (await c.statistics("a")).kept > 0
        await c.end(*map(prompt_of, samples))
        assert [(await c.statistics(name)).kept for name in "abc"] == [0, 0, 0]
        await c.send(c.put(rows.log_probs(samples)))
        assert (await c.edge(A_EDGE)).refused == 2
        assert (await c.edge(C_EDGE)).depth == 0
