"""`asyncflow bench channels`: the cost of a hop, next to padded batches, bare Ray and memory copies.

    batch   responses of 1024 tokens to 4 ranks, log-probs back: compared with a padded batch that every rank fetches
    hop     25 kB through a service of one rank and of four, as the caller sees it; compared with bare Ray actors
    large   64 MB, and 10 million tokens: bytes per second as a share of this machine's memory copy speed
    scale   rows through 4, 16 and 64 services of one process (scale.py)

Rounds of compared paths are interleaved, so that a disturbance hits all of them. Medians are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import numpy as np
import uvloop

from asyncflow.bench import scale
from asyncflow.bench.memory_copy import copy_speed
from asyncflow.bench.report import BenchRow, Measured
from asyncflow.bench.rival import BareRay, PaddedRival, nbytes, padded
from asyncflow.services.channels.endpoint import Endpoint, Store, ask
from asyncflow.services.channels.shard_refs import pack_apart, parts_of, unpack
from asyncflow.services.ranks.spec import CustomSettings, Limits, ServiceSpec
from asyncflow.services.runtime.ray import RayRuntime
from protocols.control.replies import Invoked
from protocols.control.requests import Invoke
from protocols.data import codec
from protocols.data.jagged import Jagged
from protocols.data.messages import LogProbs, Rollouts
from protocols.layout.topology import Topology

RANKS = 4
INLINE_BYTES = 8192

Way = Callable[[], Awaitable[object]]


class ChannelBenchSizes(msgspec.Struct, frozen=True):
    """How much is measured."""

    rounds: int = 15
    rows: int = 256
    tokens: int = 1024  # of a response; a prompt has a quarter as many
    large_tokens: tuple[int, ...] = (5_700_000, 10_000_000)  # prompts and responses; the first is a frame of 64 MB
    scale_rows: int = 1_000_000  # rows x hops at each number of services


QUICK = ChannelBenchSizes(rounds=1, rows=32, tokens=64, large_tokens=(65_536,), scale_rows=20_000)


class PaddedBatch(NamedTuple):
    """A padded batch that the channels are compared with, and its name in rows and in lines."""

    row: str
    line: str
    send: Way


def run(*, quick: bool) -> Measured:
    """The benchmark, as the command line runs it."""
    return uvloop.run(measure(QUICK if quick else ChannelBenchSizes()))


async def measure(sizes: ChannelBenchSizes) -> Measured:
    """Start a Ray instance, measure and stop it; then measure services in this process."""
    runtime = RayRuntime(INLINE_BYTES)
    try:
        started = await runtime.start([_service("four", RANKS), _service("one", 1)])
        four, one, store = started["four"].endpoint, started["one"].endpoint, runtime.store
        copy = copy_speed()
        hops = [await _hop(endpoint, store, ranks, sizes.rounds) for endpoint, ranks in ((one, 1), (four, RANKS))]
        batch = await _batch(four, store, sizes)
        large = [await _large(four, store, tokens, copy) for tokens in sizes.large_tokens]
    finally:
        await runtime.stop()
    grown = [await scale.measure(services, sizes.scale_rows) for services in (4, 16, 64)]
    return Measured.joined([batch, *hops, *large, scale.measured(grown)])


def rollouts_of(rows: int, tokens: int) -> Rollouts:
    """`rows` rollouts with `tokens` response tokens each and prompts a quarter as long."""
    rng = np.random.default_rng(0)
    prompt = tokens // 4
    responses = Jagged.from_lengths(rng.integers(0, 32_000, rows * tokens, np.int32), np.full(rows, tokens))
    return Rollouts(
        sample_ids=np.arange(rows, dtype=np.int64),
        prompts=Jagged.from_lengths(rng.integers(0, 32_000, rows * prompt, np.int32), np.full(rows, prompt)),
        references=Jagged.from_texts([""] * rows),
        responses=responses,
        log_probs=responses.with_values(rng.standard_normal(rows * tokens, np.float32)),
        versions=responses.with_values(np.zeros(rows * tokens, np.int32)),
        loss_mask=responses.with_values(np.ones(rows * tokens, np.uint8)),
        finishes=np.zeros(rows, np.uint8),
    )


async def call(endpoint: Endpoint, store: Store, rollouts: Rollouts, ranks: int = RANKS) -> LogProbs:
    """One call: encode, put, let the ranks read their rows and answer, read the answers."""
    parts = pack_apart(store, rollouts, 0, direct=ranks == 1)
    request = Invoke("log_probs", [part.shard for part in parts])
    reply, payloads = await ask(endpoint, request, [part.payload for part in parts])
    assert isinstance(reply, Invoked)
    answers = parts_of(reply.shards, payloads)
    return unpack([await store.get(answer.payload) for answer in answers], LogProbs)


def _service(name: str, ranks: int) -> ServiceSpec:
    return ServiceSpec(
        name=name,
        settings=CustomSettings("asyncflow.bench.workers:EchoLogProbs"),
        run="bench",
        topology=Topology(dp=ranks),
        limits=Limits(mailbox_rows=0, firing_rows=0),
    )


async def _batch(endpoint: Endpoint, store: Store, sizes: ChannelBenchSizes) -> Measured:
    """A full batch there and its log-probs back: median milliseconds of interleaved rounds, and the bytes read."""
    rollouts = rollouts_of(sizes.rows, sizes.tokens)
    wide, narrow = padded(rollouts), padded(rollouts, narrow=True)
    rival = PaddedRival(RANKS)
    wide_mb, narrow_mb = (f"padded, {nbytes(batch) / 1e6:.1f} MB" for batch in (wide, narrow))
    peers = [
        PaddedBatch("batch", f"{wide_mb} to every rank", lambda: rival.send_whole(wide)),
        PaddedBatch(
            "batch over chunks cut by the caller",
            "the same, cut by the caller into a chunk a rank",
            lambda: rival.send_chunks(wide),
        ),
        PaddedBatch(
            "batch over all to every rank in our types",
            f"{narrow_mb} in our types to every rank",
            lambda: rival.send_whole(narrow),
        ),
    ]

    async def ours() -> LogProbs:
        return await call(endpoint, store, rollouts)

    async def read_bytes() -> dict[int, int]:
        return (await scale.statistics_of(endpoint)).edges[0].read_bytes

    try:
        assert await ours() == LogProbs(sample_ids=rollouts.sample_ids, log_probs=rollouts.log_probs)
        before = await read_bytes()
        await ours()
        after = await read_bytes()
        seconds = await _interleaved([ours, *(peer.send for peer in peers)], sizes.rounds)
    finally:
        rival.close()
    ms, *peer_ms = (1e3 * statistics.median(times) for times in seconds)
    coordinator, *ranks = (after.get(rank, 0) - before.get(rank, 0) for rank in range(-1, RANKS))
    frame_bytes = codec.encode(rollouts).nbytes
    return Measured(
        [
            *(BenchRow(peer.row, ms, "ms", its, its / ms) for peer, its in zip(peers, peer_ms, strict=True)),
            BenchRow("coordinator", coordinator, "bytes", bound=0),
            *(BenchRow(f"read by rank {i}", read, "bytes", bound=frame_bytes / RANKS) for i, read in enumerate(ranks)),
        ],
        [
            f"batch  {frame_bytes / 1e6:.1f} MB into {RANKS} ranks, log-probs back: {ms:.1f} ms",
            *(f"       {p.line}: {its:.1f} ms, {its / ms:.2f} x ours" for p, its in zip(peers, peer_ms, strict=True)),
            f"       read by rank: {', '.join(f'{read / 1e3:.0f} kB' for read in ranks)};"
            f" by the coordinator: {coordinator} bytes",
        ],
    )


async def _hop(endpoint: Endpoint, store: Store, ranks: int, rounds: int) -> Measured:
    """A small message there and back, and bare Ray actors that pass the same bytes on."""
    rollouts, bare_ray = rollouts_of(16, 112), BareRay(ranks)  # 25 kB
    frame = codec.encode(rollouts)
    ways: list[Way] = [lambda: call(endpoint, store, rollouts, ranks), lambda: bare_ray.hop(frame)]
    try:
        ours, bare = await _interleaved(ways, rounds * 20)
    finally:
        bare_ray.close()
    ms, p90, bare_ms = (
        1e3 * s for s in (statistics.median(ours), statistics.quantiles(ours, n=10)[-1], statistics.median(bare))
    )
    return Measured(
        [BenchRow(f"hop, {ranks} ranks", ms, "ms", bound=bare_ms)],
        [
            f"hop    {frame.nbytes / 1e3:.0f} kB through {ranks} rank{'s' if ranks > 1 else ''}:"
            f" {ms:.2f} ms median, {p90:.2f} ms p90; bare Ray {bare_ms:.2f} ms"
        ],
    )


async def _large(endpoint: Endpoint, store: Store, tokens: int, copy: float) -> Measured:
    """A large batch there and its log-probs back, next to the memory copy speed `copy`, in bytes per second."""
    rollouts = rollouts_of(tokens // 1280, 1024)
    (times,) = await _interleaved([lambda: call(endpoint, store, rollouts)], 3)
    frame_bytes, seconds, tokens = codec.encode(rollouts).nbytes, statistics.median(times), len(rollouts) * 1280
    moved = (frame_bytes + rollouts.log_probs.values.nbytes) / seconds  # bytes per second of the frame and the answer
    return Measured(
        [BenchRow(f"large, {tokens} tokens", moved / 1e9, "GB/s", bound=copy / 1e9)],
        [
            f"large  {tokens / 1e6:.1f} million tokens, {frame_bytes / 1e6:.0f} MB: {seconds:.2f} s,"
            f" {moved / 1e9:.2f} GB/s = {moved / copy:.0%} of copying memory ({copy / 1e9:.1f} GB/s)"
        ],
    )


async def _interleaved(ways: list[Way], rounds: int) -> list[list[float]]:
    """Seconds of each way, by round, after one warm-up round."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, times in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            await way()
            if number:
                times.append(time.perf_counter() - start)
    return seconds
