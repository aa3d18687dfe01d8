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

import msgspec
import numpy as np
import uvloop

from asyncflow.bench import scale
from asyncflow.bench.report import BenchRow, Measured
from asyncflow.bench.rival import BareRay, PaddedRival, nbytes, padded
from asyncflow.services.channels.endpoint import Endpoint, Store, ask
from asyncflow.services.channels.shard_refs import pack_apart, parts_of, unpack
from asyncflow.services.ranks.spec import CustomSettings, Limits, ServiceSpec
from asyncflow.services.runtime.ray import RayRuntime
from protocols.control.delivery import EdgeStatistics
from protocols.control.requests import GetStatistics, Invoke, Invoked, Statistics
from protocols.data import codec
from protocols.data.columns import Jagged
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


class BatchFigures(msgspec.Struct, frozen=True):
    """The full batch there and its log-probs back: median milliseconds of interleaved rounds."""

    frame_bytes: int
    ours_ms: float
    padded_bytes: int
    padded_ms: float  # the whole padded batch to every rank
    chunked_ms: float  # the same columns, cut by the caller into one object a rank
    narrow_bytes: int
    narrow_ms: float  # our columns and types, all of them to every rank
    speedup: float
    speedup_chunked: float
    speedup_narrow: float
    read_bytes: list[int]  # by rank
    coordinator_bytes: int  # of payload that the coordinator read


class HopFigures(msgspec.Struct, frozen=True):
    """A small message there and back."""

    ranks: int
    frame_bytes: int
    median_ms: float
    p90_ms: float
    bare_ms: float  # of bare Ray actors that pass the same bytes on


class LargeFigures(msgspec.Struct, frozen=True):
    """A large batch there and its log-probs back."""

    tokens: int
    frame_bytes: int
    seconds: float
    gigabytes_per_second: float  # of bytes that moved: the frame and the answer
    bandwidth_share: float  # of what one thread copies in memory


class ChannelFigures(msgspec.Struct, frozen=True):
    """All figures of one run."""

    batch: BatchFigures
    hops: list[HopFigures]
    large: list[LargeFigures]
    copy_gigabytes_per_second: float
    scale: list[scale.ScaleFigures]


def run(*, quick: bool) -> Measured:
    """The benchmark, as the command line runs it."""
    figures = uvloop.run(measure(QUICK if quick else ChannelBenchSizes()))
    return Measured(rows(figures), lines(figures))


async def measure(sizes: ChannelBenchSizes = ChannelBenchSizes()) -> ChannelFigures:  # noqa: B008 - frozen
    """Start a Ray instance, measure and stop it; then measure services in this process."""
    runtime = RayRuntime(INLINE_BYTES)
    try:
        started = await runtime.start([_service("four", RANKS), _service("one", 1)])
        four, one = started["four"].endpoint, started["one"].endpoint
        copy = _copy_speed()
        hops = [await _hop(endpoint, runtime.store, ranks, sizes) for endpoint, ranks in ((one, 1), (four, RANKS))]
        batch = await _batch(four, runtime.store, sizes)
        large = [await _large(four, runtime.store, tokens, copy) for tokens in sizes.large_tokens]
    finally:
        await runtime.stop()
    grown = [await scale.measure(services, sizes.scale_rows) for services in (4, 16, 64)]
    return ChannelFigures(batch, hops, large, copy / 1e9, grown)


def lines(figures: ChannelFigures) -> list[str]:
    """The figures as text, each next to its bound."""
    batch, copy = figures.batch, figures.copy_gigabytes_per_second
    found = [
        f"batch  {batch.frame_bytes / 1e6:.1f} MB into {RANKS} ranks, log-probs back: {batch.ours_ms:.1f} ms",
        f"       padded, {batch.padded_bytes / 1e6:.1f} MB to every rank: {batch.padded_ms:.1f} ms,"
        f" {batch.speedup:.2f} x ours",
        f"       the same, cut by the caller into a chunk a rank: {batch.chunked_ms:.1f} ms,"
        f" {batch.speedup_chunked:.2f} x ours",
        f"       padded, {batch.narrow_bytes / 1e6:.1f} MB in our types to every rank: {batch.narrow_ms:.1f} ms,"
        f" {batch.speedup_narrow:.2f} x ours",
        f"       read by rank: {', '.join(f'{b / 1e3:.0f} kB' for b in batch.read_bytes)};"
        f" by the coordinator: {batch.coordinator_bytes} bytes",
    ]
    found += [
        f"hop    {hop.frame_bytes / 1e3:.0f} kB through {hop.ranks} rank{'s' if hop.ranks > 1 else ''}:"
        f" {hop.median_ms:.2f} ms median, {hop.p90_ms:.2f} ms p90; bare Ray {hop.bare_ms:.2f} ms"
        for hop in figures.hops
    ]
    found += [
        f"large  {large.tokens / 1e6:.1f} million tokens, {large.frame_bytes / 1e6:.0f} MB: {large.seconds:.2f} s,"
        f" {large.gigabytes_per_second:.2f} GB/s = {large.bandwidth_share:.0%} of copying memory ({copy:.1f} GB/s)"
        for large in figures.large
    ]
    return found + [scale.format_line(grown) for grown in figures.scale]


def rows(figures: ChannelFigures) -> list[BenchRow]:
    """The figures as rows."""
    batch, copy = figures.batch, figures.copy_gigabytes_per_second
    found = [
        BenchRow("batch", batch.ours_ms, "ms", peer=batch.padded_ms, ratio=batch.speedup),
        BenchRow("batch over chunks cut by the caller", batch.ours_ms, "ms", batch.chunked_ms, batch.speedup_chunked),
        BenchRow(
            "batch over all to every rank in our types", batch.ours_ms, "ms", batch.narrow_ms, batch.speedup_narrow
        ),
        BenchRow("coordinator", batch.coordinator_bytes, "bytes", bound=0),
    ]  # fmt: skip
    share = batch.frame_bytes / RANKS
    found += [
        BenchRow(f"read by rank {rank}", read, "bytes", bound=share) for rank, read in enumerate(batch.read_bytes)
    ]
    found += [BenchRow(f"hop, {hop.ranks} ranks", hop.median_ms, "ms", bound=hop.bare_ms) for hop in figures.hops]
    found += [
        BenchRow(f"large, {large.tokens} tokens", large.gigabytes_per_second, "GB/s", bound=copy)
        for large in figures.large
    ]
    least = min(grown.microseconds_per_row for grown in figures.scale)
    return found + [
        BenchRow(f"scale, {grown.services} services", grown.microseconds_per_row, "us a row", bound=least)
        for grown in figures.scale
    ]


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
        term=0,
        seed=0,
        deterministic=False,
        stages=[],
        pool="",
        topology=Topology(dp=ranks),
        leased=False,
        samples_per_prompt=1,
        limits=Limits(mailbox_rows=0, firing_rows=0),
    )


async def _batch(endpoint: Endpoint, store: Store, sizes: ChannelBenchSizes) -> BatchFigures:
    rollouts = rollouts_of(sizes.rows, sizes.tokens)
    wide, narrow = padded(rollouts), padded(rollouts, narrow=True)
    rival = PaddedRival(RANKS)

    async def ours() -> LogProbs:
        return await call(endpoint, store, rollouts)

    ways: list[Way] = [
        ours,
        lambda: rival.fetch_all(wide),
        lambda: rival.fetch_chunk(wide),
        lambda: rival.fetch_all(narrow),
    ]
    try:
        assert await ours() == LogProbs(sample_ids=rollouts.sample_ids, log_probs=rollouts.log_probs)
        before = await _reading(endpoint)
        await ours()
        after = await _reading(endpoint)
        mine, theirs, chunked, theirs_narrow = (
            statistics.median(times) * 1e3 for times in await _interleaved(ways, sizes.rounds)
        )
    finally:
        rival.close()
    read = {rank: count - before.read_bytes.get(rank, 0) for rank, count in after.read_bytes.items()}
    return BatchFigures(
        frame_bytes=codec.encode(rollouts).nbytes,
        ours_ms=mine,
        padded_bytes=nbytes(wide),
        padded_ms=theirs,
        chunked_ms=chunked,
        narrow_bytes=nbytes(narrow),
        narrow_ms=theirs_narrow,
        speedup=theirs / mine,
        speedup_chunked=chunked / mine,
        speedup_narrow=theirs_narrow / mine,
        read_bytes=[read.get(rank, 0) for rank in range(RANKS)],
        coordinator_bytes=read.get(-1, 0),
    )


async def _reading(endpoint: Endpoint) -> EdgeStatistics:
    """What the service has read so far."""
    reply, _ = await ask(endpoint, GetStatistics())
    assert isinstance(reply, Statistics)
    return reply.statistics.edges[0]


async def _hop(endpoint: Endpoint, store: Store, ranks: int, sizes: ChannelBenchSizes) -> HopFigures:
    rollouts, bare_ray = rollouts_of(16, 112), BareRay(ranks)  # 25 kB
    frame = codec.encode(rollouts)
    ways: list[Way] = [lambda: call(endpoint, store, rollouts, ranks), lambda: bare_ray.hop(frame)]
    try:
        times, bare = await _interleaved(ways, sizes.rounds * 20)
    finally:
        bare_ray.close()
    return HopFigures(
        ranks=ranks,
        frame_bytes=frame.nbytes,
        median_ms=statistics.median(times) * 1e3,
        p90_ms=statistics.quantiles(times, n=10)[-1] * 1e3,
        bare_ms=statistics.median(bare) * 1e3,
    )


async def _large(endpoint: Endpoint, store: Store, tokens: int, copy: float) -> LargeFigures:
    rollouts = rollouts_of(tokens // 1280, 1024)
    (times,) = await _interleaved([lambda: call(endpoint, store, rollouts)], 3)
    frame, seconds = codec.encode(rollouts).nbytes, statistics.median(times)
    moved = frame + rollouts.log_probs.values.nbytes
    return LargeFigures(
        tokens=len(rollouts) * 1280,
        frame_bytes=frame,
        seconds=seconds,
        gigabytes_per_second=moved / seconds / 1e9,
        bandwidth_share=moved / seconds / copy,
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


def _copy_speed() -> float:
    """Bytes per second that one thread copies: the upper bound of every path through memory."""
    source = np.ones(64 << 20, np.uint8)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return source.nbytes / best
