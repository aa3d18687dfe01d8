"""Ray's object store under our services: what exceeds its memory goes to disk, and nobody waits for room."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncflow.services.runtime.ray import RayRuntime

pytestmark = pytest.mark.ray

STORE_BYTES = 80 << 20  # the least that Ray takes
FRAME_BYTES = 8 << 20


@pytest.mark.usefixtures("no_ray")
async def test_rows_in_flight_may_exceed_the_memory_that_was_given_to_them():
    runtime = RayRuntime(inline_bytes=1024, store_bytes=STORE_BYTES)
    try:
        await runtime.start([])
        count = 2 * STORE_BYTES // FRAME_BYTES
        async with asyncio.timeout(60):  # for puts that must not wait
            payloads = [
                await asyncio.to_thread(runtime.store.put, np.full(FRAME_BYTES, number, np.uint8))
                for number in range(count)
            ]
        for number, payload in enumerate(payloads):
            frame = await runtime.store.get(payload)
            assert (int(frame[0]), int(frame[-1]), frame.nbytes) == (number, number, FRAME_BYTES)
            assert not frame.flags.writeable
            del frame
    finally:
        await runtime.stop()
