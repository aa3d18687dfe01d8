"""Publication: the policy's snapshot goes to every generator, and counts when each has proved that it is installed.

    policy.update done -> lease back -> snapshot (a copy) -> load on each replica -> receipts -> commit

The proof is threefold: digests of the bytes as sent, the probe batch's log-probs within tolerance, and an empty
prefix cache. Whatever goes wrong names the replica and the cause.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from asyncflow.services.endpoint import Endpoint, Payload, ServiceError, ask
from protocols.events import Published
from protocols.requests import Installed, LoadWeights, SnapshotTaken, TakeSnapshot
from protocols.weights import InstallReceipt, Version, WeightManifest


class PublicationFailed(Exception):
    """Weights did not arrive or were not installed."""


async def publish(
    policy: Endpoint, generators: Sequence[Endpoint], version: Version, deadline_seconds: float
) -> Published:
    """Publish the policy's current weights as `version`. Raises PublicationFailed naming replica and cause."""
    start = time.monotonic()
    waiting = {f"snapshot of {policy.name}"}
    try:
        async with asyncio.timeout(deadline_seconds):
            manifest, receipts = await _publish(policy, generators, version, waiting)
    except TimeoutError:
        what = ", ".join(sorted(waiting))
        raise PublicationFailed(f"version {version}: no answer within {deadline_seconds:g} s from: {what}") from None
    return Published(version=version, nbytes=manifest.total_bytes, seconds=time.monotonic() - start, receipts=receipts)


async def _publish(
    policy: Endpoint, generators: Sequence[Endpoint], version: Version, waiting: set[str]
) -> tuple[WeightManifest, list[InstallReceipt]]:
    """Snapshot, then load everywhere at once; `waiting` says at any moment who has not answered."""
    receipts: list[InstallReceipt] = []
    manifest: WeightManifest
    payloads: list[Payload]

    async def install(generator: Endpoint) -> None:
        waiting.add(f"load on {generator.name}")
        reply, _ = await ask(generator, LoadWeights(manifest), payloads)
        assert isinstance(reply, Installed)
        receipts.append(reply.receipt)
        waiting.discard(f"load on {generator.name}")

    try:
        reply, payloads = await ask(policy, TakeSnapshot(version))
        assert isinstance(reply, SnapshotTaken)
        manifest = reply.manifest
        waiting.clear()
        async with asyncio.TaskGroup() as group:
            for generator in generators:
                group.create_task(install(generator), name=f"publish {version} to {generator.name}")
    except* ServiceError as errors:
        raise PublicationFailed(f"version {version}: {'; '.join(map(str, errors.exceptions))}") from None
    return manifest, receipts
