"""The frame store on Ray: shared memory within the bound, and beyond it Ray's object store, which spills to disk."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncflow.services.runtime.ray import RayRuntime
from asyncflow.services.runtime.ray_store import DIRECT_BYTES, RETURNED_INLINE_BYTES, RayStore, ReplyStore
from asyncflow.services.runtime.shared import SharedFrame, holdings

pytestmark = pytest.mark.ray

STORE_BYTES = 80 << 20  # the smallest that Ray accepts
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
        shared = [payload for payload in payloads if isinstance(payload, SharedFrame)]
        assert 0 < len(shared) * FRAME_BYTES <= STORE_BYTES // 2
        for number, payload in enumerate(payloads):
            frame = await runtime.store.get(payload)
            assert (int(frame[0]), int(frame[-1]), frame.nbytes) == (number, number, FRAME_BYTES)
            assert not frame.flags.writeable
            del frame
    finally:
        await runtime.stop()


def frame(number: int, nbytes: int = DIRECT_BYTES + 1) -> np.ndarray:
    return np.full(nbytes, number, np.uint8)


async def values(store: RayStore, payloads: list) -> list[int]:
    return [int((await store.get(payload))[-1]) for payload in payloads]


def kinds(payloads: list) -> list[type]:
    return [type(payload) for payload in payloads]


@pytest.mark.usefixtures("ray_started")
async def test_a_frame_is_kept_where_its_size_and_the_bound_have_it():
    bound = holdings().nbytes + 2 * (DIRECT_BYTES + 1)
    store = RayStore(inline_bytes=1024, shared_bytes=bound)
    payloads = [store.put(frame(0, 1024)), store.put(frame(1, DIRECT_BYTES), direct=True)]
    payloads += [store.put(frame(number)) for number in (2, 3, 4)]
    assert kinds(payloads) == [bytes, bytes, SharedFrame, SharedFrame, list]
    assert await values(store, payloads) == [0, 1, 2, 3, 4]
    assert [store.inline_bytes(payload) for payload in payloads] == [1024, DIRECT_BYTES, 0, 0, 0]
    del payloads
    assert kinds([store.put(frame(5))]) == [SharedFrame], "what was let go makes room"
    assert kinds([RayStore(inline_bytes=1024).put(frame(6))]) == [list], "where processes share no memory"


@pytest.mark.usefixtures("ray_started")
async def test_what_ray_is_to_carry_is_put_into_its_store():
    store = RayStore(inline_bytes=1024, shared_bytes=1 << 30)
    payloads = [store.put(frame(0, 10)), store.put(frame(1)), RayStore(1024).put(frame(2))]
    references = await store.by_reference(payloads)
    assert kinds(payloads) == [bytes, SharedFrame, list]
    assert kinds(references) == [bytes, list, list]
    assert references[2] is payloads[2]
    assert await values(store, references) == [0, 1, 2]
    assert (await store.by_reference(payloads))[1] is references[1], "once, however many read it"


@pytest.mark.usefixtures("ray_started")
async def test_what_arrives_beyond_the_bound_goes_where_it_can_spill():
    arriving = [SharedFrame.of(frame(number)) for number in range(3)]
    held = holdings().nbytes
    within, beyond = RayStore(1024, shared_bytes=held), RayStore(1024, shared_bytes=held - 1)
    assert await within.admit(arriving) == arriving
    spilled = await beyond.admit(arriving)
    assert kinds(spilled) == [list] * 3
    assert await values(beyond, spilled) == [0, 1, 2]
    assert await within.admit([b"small"]) == [b"small"]


@pytest.mark.usefixtures("ray_started")
def test_a_ranks_reply_leaves_by_the_way_its_call_came():
    large = frame(1, RETURNED_INLINE_BYTES + 1)
    assert isinstance(RayStore(inline_bytes=1024, shared_bytes=1 << 30).put(large), SharedFrame)
    assert isinstance(ReplyStore(inline_bytes=1024).put(large), list)
    output = ReplyStore(inline_bytes=1024, apart=True)
    assert isinstance(output.put(frame(2)), list), "too small for Ray to put it into its store by itself"
    assert output.put(large) is None
    assert output.frame is large
    assert isinstance(output.put(large), list), "the first alone"
