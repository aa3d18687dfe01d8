"""The cost of a row in channels and joins as the number of services grows, in one process.

The services form layers of two. Each sends to both services of the next layer, which join the two inputs row by row,
so S services have 2 S channels. The rows hold one number: only delivery, join and bookkeeping are measured. A
constant time per row means that the cost of a service does not depend on how many others there are.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Sequence
from itertools import product

import msgspec
import numpy as np

from asyncflow.bench.report import BenchRow, Measured
from asyncflow.services.channels.endpoint import Endpoint, ask
from asyncflow.services.channels.shard_refs import pack
from asyncflow.services.ranks.spec import CustomSettings, Limits, ServiceSpec, StageSpec, Target
from asyncflow.services.runtime.local import LocalRuntime
from protocols.control.delivery import Delivery, ServiceStatistics
from protocols.control.replies import Statistics
from protocols.control.requests import EndPrompts, GetStatistics
from protocols.data.ids import prompt_of, sample_id
from protocols.data.messages import Scores

WAVE = 512  # rows sent together; a wave's prompts are finished before the next wave starts
SAMPLES = 8  # per prompt
WIDTH = 2


class ScaleFigures(msgspec.Struct, frozen=True):
    """The figures at one number of services."""

    services: int
    channels: int
    rows: int  # received, summed over all channels
    microseconds_per_row: float
    most_held: int  # rows that any mailbox held at once
    most_kept: int  # deliveries in the outboxes at the end, over all services
    resident_megabytes: float  # the peak of the process


async def measure(services: int, rows: int) -> ScaleFigures:
    """Send waves until about `rows` rows, summed over the channels, have been received."""
    runtime = LocalRuntime()
    try:
        started = await runtime.start(_specs(services))
        last = [started[name].endpoint for name in list(started)[-WIDTH:]]
        waves = max(2, rows // (WAVE * WIDTH * services))
        start = time.perf_counter()
        for wave in range(waves):
            samples = _samples(wave)
            part = pack(runtime.store, Scores(sample_ids=samples, scores=np.zeros(WAVE, np.float32)), 0)
            for place, position in product(range(WIDTH), repeat=2):
                delivery = Delivery(_edge(0, place, position), 0, [part.shard])
                await started[_name(0, place)].endpoint.deliver(delivery, [part.payload])
            await _until_passed(last, (wave + 1) * WAVE)
            over = EndPrompts(sorted({prompt_of(s) for s in samples.tolist()}))
            await asyncio.gather(*(ask(s.endpoint, over) for s in started.values()))
        seconds = time.perf_counter() - start
        statistics = [await statistics_of(s.endpoint) for s in started.values()]
    finally:
        await runtime.stop()
    edges = [edge for s in statistics for edge in s.edges]
    taken = sum(edge.rows for edge in edges)
    return ScaleFigures(
        services=services,
        channels=len(edges),
        rows=taken,
        microseconds_per_row=seconds / taken * 1e6,
        most_held=max(edge.peak for edge in edges),
        most_kept=sum(s.kept for s in statistics),
        resident_megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def measured(figures: Sequence[ScaleFigures]) -> Measured:
    """The figures at growing numbers of services as rows, bounded by the fastest of them, and as text."""
    least = min(one.microseconds_per_row for one in figures)
    return Measured(
        [
            BenchRow(f"scale, {one.services} services", one.microseconds_per_row, "us a row", bound=least)
            for one in figures
        ],
        [
            f"scale  {one.services} services, {one.channels} channels, {one.rows:,} rows:"
            f" {one.microseconds_per_row:.1f} us a row; at most {one.most_held} held in a mailbox,"
            f" {one.most_kept} deliveries left at the end, {one.resident_megabytes:.0f} MB resident"
            for one in figures
        ],
    )


def _specs(services: int) -> list[ServiceSpec]:
    layers = services // WIDTH
    return [_spec(layer, place, last=layer == layers - 1) for layer in range(layers) for place in range(WIDTH)]


def _spec(layer: int, place: int, *, last: bool) -> ServiceSpec:
    inputs = [_edge(layer, place, position) for position in range(WIDTH)]
    outputs = [] if last else [Target(_name(layer + 1, to), _edge(layer + 1, to, place)) for to in range(WIDTH)]
    stage = StageSpec(
        name=_stage(layer, place),
        method="add",
        fires="rows",
        inputs=inputs,
        schemas=[Scores.schema_id] * len(inputs),
        sources=[_stage(layer - 1, source) for source in range(WIDTH)] if layer else ["source"],
        outputs=outputs,
        protocol="DP_PROTO",
    )
    return ServiceSpec(
        name=_name(layer, place),
        settings=CustomSettings("asyncflow.bench.workers:Relay"),
        run="bench",
        stages=[stage],
        samples_per_prompt=SAMPLES,
        limits=Limits(mailbox_rows=WAVE, firing_rows=WAVE),
    )


def _samples(wave: int) -> np.ndarray:
    first = wave * WAVE // SAMPLES
    return np.array([sample_id(first + i // SAMPLES, i % SAMPLES) for i in range(WAVE)], np.int64)


async def statistics_of(endpoint: Endpoint) -> ServiceStatistics:
    """The channel statistics of a service."""
    reply, _ = await ask(endpoint, GetStatistics())
    assert isinstance(reply, Statistics)
    return reply.statistics


async def _until_passed(endpoints: list[Endpoint], rows: int) -> None:
    """Wait until the last layer has received `rows` rows on every edge; each notice triggers another look."""
    for endpoint in endpoints:
        while any(edge.rows < rows or edge.depth for edge in (await statistics_of(endpoint)).edges):
            await endpoint.notices()


def _name(layer: int, place: int) -> str:
    return f"relay-{layer}-{place}"


def _stage(layer: int, place: int) -> str:
    return f"{_name(layer, place)}.add#1"


def _edge(layer: int, place: int, position: int) -> str:
    return f"{_stage(layer, place)}.{position}"
