"""Services as Ray actors: each rank reads its own rows only and a coordinator reads none; a killed process neither
loses nor duplicates rows."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from asyncflow.services.channels.shard_refs import pack_apart
from asyncflow.services.runtime.ray import RayRuntime
from asyncflow.services.runtime.shared import SharedFrame
from tests.asyncflow.services import rows
from tests.asyncflow.services.chain import A_EDGE, B_EDGE, C_EDGE, PATIENCE_SECONDS, Chain, chain_specs, samples_of
from tests.asyncflow.services.workers import process_of

pytestmark = pytest.mark.ray

INLINE_BYTES = 8192
BLOCK_BYTES = 1 << 16  # the smallest block of a large frame
LONG = 20_000  # tokens: a row of them never travels inside a message


@asynccontextmanager
async def chain(
    a: dict[str, Any] | None = None, b: dict[str, Any] | None = None, *, wired: bool = True
) -> AsyncIterator[Chain]:
    made = Chain(RayRuntime(INLINE_BYTES, wired=wired))
    try:
        await made.start(chain_specs(a, b))
        yield made
    finally:
        await made.runtime.stop()


def alive(chain: Chain) -> Counter[int]:
    """Sample id -> how often it settled with a value."""
    return Counter(sample for settled in chain.settled for sample in settled.alive)


def shared_frames() -> set[tuple[int, str]]:
    """(process, descriptor) of every shared frame that a process of this user holds."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # a process that has ended in the meantime
            if "asyncflow frame" in str(entry.readlink()):
                found.add((int(entry.parts[2]), entry.name))
    return found


def kill(*processes: int) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


@pytest.mark.usefixtures("ray_started")
async def test_each_rank_reads_the_bytes_of_its_own_rows_and_a_coordinator_reads_none():
    samples, tokens, sources = samples_of(*range(256)), 4096, 2
    async with chain() as c:
        halves = [c.put(rows.log_probs(half, tokens)) for half in (samples[:128], samples[128:])]
        await c.send(*halves)
        await c.until_settled(256)
        a, b = await c.edge(A_EDGE), await c.edge(B_EDGE)
        assert alive(c) == Counter(samples)
        assert await c.values(samples) == {sample: -4.0 * sample for sample in samples}
    row_bytes = 8 + 4 + 4 * tokens  # id, length, values
    for rank in range(4):
        mine = 256 // 4 * row_bytes
        assert mine <= a.read_bytes[rank] <= 1.02 * mine + sources * BLOCK_BYTES
    assert sum(a.read_bytes.values()) < 1.1 * sum(half.shard.nbytes for half in halves)
    assert -1 not in a.read_bytes, "the coordinator of several ranks"
    assert 256 * row_bytes <= b.read_bytes[0] <= 1.02 * 256 * row_bytes
    assert (a.inline_bytes, b.inline_bytes) == (0, 0)


@pytest.mark.usefixtures("ray_started")
@pytest.mark.parametrize("wired", [True, False])
@pytest.mark.parametrize("tokens", [4, LONG])
async def test_services_call_each_other_by_ray_alone_where_there_is_no_wire(wired: bool, tokens: int):
    samples = samples_of(*range(8))
    async with chain(wired=wired) as c:
        sent = c.put(rows.log_probs(samples, tokens))
        assert type(sent.payload) is (bytes if tokens == 4 else SharedFrame if wired else list)
        await c.send(sent)
        await c.until_settled(8)
        assert alive(c) == Counter(samples)
        assert ("@asyncflow/b-" in Path("/proc/net/unix").read_text()) == wired


@pytest.mark.usefixtures("ray_started")
async def test_a_small_batch_passes_through_a_coordinator_in_pieces_of_which_each_rank_gets_its_own():
    samples = samples_of(*range(16))
    async with chain() as c:
        batch = rows.log_probs(samples, 400)
        parts = pack_apart(c.runtime.store, batch, term=0)
        await c.send(*parts)
        await c.until_settled(16)
        a, b = await c.edge(A_EDGE), await c.edge(B_EDGE)
        assert await c.values(samples) == {sample: -4.0 * sample for sample in samples}
    assert max(part.shard.nbytes for part in parts) <= INLINE_BYTES < batch.nbytes
    assert a.inline_bytes == sum(part.shard.nbytes for part in parts)
    assert a.read_bytes == {rank: part.shard.nbytes for rank, part in enumerate(parts)}, (
        "one each, and none by the coordinator"
    )
    assert b.inline_bytes > 0, "and so are the answers"


@pytest.mark.usefixtures("ray_started")
@pytest.mark.parametrize("tokens", [pytest.param(LONG, id="in shared memory"), pytest.param(3, id="inside")])
async def test_a_consumer_that_is_killed_has_a_successor_that_is_sent_all_of_it_again(tmp_path: Path, tokens: int):
    samples = samples_of(*range(24))
    slowly = {
        "firing_rows": 2,
        "mailbox_rows": 4,
        "delay_seconds": {"double": 0.05},
        "options": {"folder": str(tmp_path)},
    }
    async with chain(a={"firing_rows": 8}, b=slowly) as c:
        await c.send(c.put(rows.log_probs(samples, tokens)))
        await c.until_settled(6)
        kill(process_of(tmp_path, "b"))
        await c.restart("b")
        assert len(c.settled) < len(samples), "it was over before it was killed"
        await c.redeliver(B_EDGE)
        await c.until_settled(24)
        assert alive(c) == Counter(samples)
        assert await c.values(samples) == {sample: -4.0 * sample for sample in samples}
        assert (await c.edge(C_EDGE)).refused >= 6, "the successor did again what its predecessor had done"


@pytest.mark.usefixtures("ray_started")
async def test_shared_memory_is_free_when_its_prompts_are_over():
    """No mailbox, outbox, rank or connection may still hold a descriptor; /proc shows whether one does."""
    samples, before = samples_of(*range(24)), shared_frames()
    async with chain() as c:
        for some in (samples[:12], samples[12:]):
            await c.send(c.put(rows.log_probs(some, LONG)))
        await c.until_settled(24)
        assert shared_frames() - before
        await c.values(samples)
        await c.end(*range(24))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while shared_frames() - before:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pytest.fail(f"frames are still held: {sorted(shared_frames() - before)} (process, descriptor)")


@pytest.mark.usefixtures("ray_started")
async def test_rows_in_shared_memory_outlive_their_producer(tmp_path: Path):
    held_up, unread = samples_of(*range(4)), samples_of(*range(4, 12))
    gate = {"options": {"folder": str(tmp_path), "gate": "open"}}
    async with chain(a={"options": {"folder": str(tmp_path)}}, b=gate) as c:
        await c.send(c.put(rows.log_probs(held_up, LONG)))
        await c.until("b", "", depth=0)
        await c.send(c.put(rows.log_probs(unread, LONG)))
        await c.until("b", "", depth=8)
        kill(*(process_of(tmp_path, "a", rank) for rank in range(4)))
        await c.restart("a")
        (tmp_path / "open").touch()
        await c.until_settled(12)
        assert alive(c) == Counter(held_up + unread)
        assert await c.values(unread) == {sample: -4.0 * sample for sample in unread}


@pytest.mark.usefixtures("ray_started")
async def test_rows_in_rays_store_whose_producer_died_unread_are_taken_from_its_successor(tmp_path: Path):
    read, unread = samples_of(*range(4)), samples_of(*range(4, 12))
    held = {"options": {"folder": str(tmp_path), "gate": "open"}}
    async with chain(a={"options": {"folder": str(tmp_path)}}, b=held, wired=False) as c:
        await c.send(c.put(rows.log_probs(read, LONG)))
        await c.until("b", "", depth=0)
        again = c.put(rows.log_probs(unread, LONG))
        await c.send(again)
        await c.until("b", "", depth=8)
        kill(*(process_of(tmp_path, "a", rank) for rank in range(4)))
        await c.restart("a")
        (tmp_path / "open").touch()
        await c.until("b", "rows on a.double#1", depth=0)
        assert (await c.edge(B_EDGE)).read_bytes[0] < 1.02 * len(read) * (4 * LONG + 12), "nothing was lost"
        await c.until_settled(4)
        assert alive(c) == Counter(read), "what was lost is no value and no tombstone"
        await c.send(again)
        await c.until_settled(12)
        assert alive(c) == Counter(read + unread)
        assert await c.values(unread) == {sample: -4.0 * sample for sample in unread}
        assert (await c.edge(B_EDGE)).refused == 0
