"""Publication between services: the policy publishes a snapshot, and every generator loads and verifies it.

    policy.update done -> lease returned -> snapshot (a copy) -> load on each replica -> receipts -> commit

`workers.generation.publication` says what a receipt shows. Every error names the replica and the cause.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from asyncflow.services.channels.endpoint import Payload, Requestable, ServiceError, ask
from protocols.control.events import Published
from protocols.control.replies import Installed, SnapshotTaken
from protocols.control.requests import LoadWeights, TakeSnapshot
from protocols.version import InstallReceipt, Version
from protocols.weights import WeightManifest


class PublicationFailed(Exception):
    """Weights did not arrive or were not installed."""


class Snapshot(NamedTuple):
    """Published weights, for generators that start later; they stay in the store as long as this object exists."""

    manifest: WeightManifest
    payloads: list[Payload]


async def publish(
    policy: Requestable, generators: Sequence[Requestable], version: Version, deadline_seconds: float
) -> tuple[Published, Snapshot]:
    """Publish the policy's current weights as `version`. Raises PublicationFailed naming replica and cause."""
    start = time.monotonic()
    waiting = {f"snapshot of {policy.name}"}
    try:
        async with asyncio.timeout(deadline_seconds):
            snapshot, receipts = await _publish(policy, generators, version, waiting)
    except TimeoutError:
        what = ", ".join(sorted(waiting))
        raise PublicationFailed(f"version {version}: no answer within {deadline_seconds:g} s from: {what}") from None
    nbytes, seconds = snapshot.manifest.total_bytes, time.monotonic() - start
    return Published(version=version, nbytes=nbytes, seconds=seconds, receipts=receipts), snapshot


async def install(generator: Requestable, snapshot: Snapshot) -> InstallReceipt:
    """Have a generator load weights and return its proof. Raises ServiceError."""
    reply, _ = await ask(generator, LoadWeights(snapshot.manifest), snapshot.payloads)
    assert isinstance(reply, Installed)
    return reply.receipt


async def _publish(
    policy: Requestable, generators: Sequence[Requestable], version: Version, waiting: set[str]
) -> tuple[Snapshot, list[InstallReceipt]]:
    """Take a snapshot, then load it everywhere at once; `waiting` always names who has not answered yet."""
    receipts: list[InstallReceipt] = []
    snapshot: Snapshot

    async def load(generator: Requestable) -> None:
        waiting.add(f"load on {generator.name}")
        receipts.append(await install(generator, snapshot))
        waiting.discard(f"load on {generator.name}")

    try:
        reply, payloads = await ask(policy, TakeSnapshot(version))
        assert isinstance(reply, SnapshotTaken)
        snapshot = Snapshot(reply.manifest, payloads)
        waiting.clear()
        async with asyncio.TaskGroup() as group:
            for generator in generators:
                group.create_task(load(generator), name=f"publish {version} to {generator.name}")
    except* ServiceError as errors:
        raise PublicationFailed(f"version {version}: {'; '.join(map(str, errors.exceptions))}") from None
    return snapshot, receipts
