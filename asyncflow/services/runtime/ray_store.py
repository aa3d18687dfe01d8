"""Where frames wait between Ray actors: small ones in the messages, larger ones in shared memory, or in Ray's store.

    up to the inline limit      bytes, inside the message
    one node, within the bound  a shared frame (shared.py), whose descriptor travels on the wire
    otherwise                   a reference in a list, so that Ray hands it on and only the reader fetches the bytes

Ray's store reaches other nodes, and spills to disk what exceeds its memory. Shared memory does neither, and so is
bounded, but it needs no owner to be asked and no copy to be fetched, and outlives who wrote it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from asyncflow.services.channels.endpoint import Frame, Payload, PayloadLost
from asyncflow.services.runtime.shared import SharedFrame, holdings

RETURNED_INLINE_BYTES = 128 << 10  # above Ray's own limit of 100 KiB for values that travel inside an answer
DIRECT_BYTES = 1 << 16  # up to here a copy in the message is quicker than a store and its bookkeeping


class RayStore:
    """Implements `Store`."""

    def __init__(self, inline_bytes: int, shared_bytes: int = 0) -> None:
        """`shared_bytes`: of the shared memory that this process may hold, 0 where not all processes share one."""
        self._inline_limit, self.shared_bytes = inline_bytes, shared_bytes

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        if frame.nbytes <= (max(self._inline_limit, DIRECT_BYTES) if direct else self._inline_limit):
            return frame.tobytes()
        if self._may_share(frame.nbytes):
            with contextlib.suppress(OSError):  # no memory, or no descriptor: Ray's store can spill
                return SharedFrame.of(frame)
        return [ray.put(frame)]

    def piece_bytes(self, nbytes: int, direct: bool) -> int:
        """A coordinator of several ranks may pass small frames on: a few of them need no store."""
        return self._inline_limit if not direct and self._inline_limit < nbytes <= DIRECT_BYTES else 0

    async def get(self, payload: Payload) -> Frame:
        if isinstance(payload, list):
            try:
                return await payload[0]
            except ObjectLostError as error:
                raise PayloadLost(str(error)) from error
        return _mapped(payload)

    def inline_bytes(self, payload: Payload) -> int:
        return len(payload) if isinstance(payload, bytes) else 0

    async def by_reference(self, payloads: Sequence[Payload]) -> list[Payload]:
        """As Ray can carry them: what is in shared memory goes to its store."""
        if not any(isinstance(payload, SharedFrame) for payload in payloads):
            return list(payloads)
        return await asyncio.to_thread(lambda: [referenced(payload) for payload in payloads])

    async def admit(self, payloads: Sequence[Payload]) -> list[Payload]:
        """What has arrived: as it is while shared memory is within its bound, or by reference, so that it can spill."""
        return list(payloads) if self._may_share() else await self.by_reference(payloads)

    def _may_share(self, more: int = 0) -> bool:
        """Whether `more` bytes may stay in shared memory, beside what this process holds there."""
        return holdings().room(self.shared_bytes, more)


class RankStore(RayStore):
    """A rank's, which works on one call at a time, in a thread without an event loop.

    The answer to a call that came by Ray leaves by Ray. Of a large call its first large frame leaves as a value of
    that call, which spares Ray an owner to ask; only frames that Ray puts into its store by itself, for smaller values
    would travel through the coordinator.
    """

    by_ray = False  # the call that is worked on came by Ray
    answers_apart = False  # and is a large one
    answer: Frame | None = None

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        if self.answers_apart and self.answer is None and frame.nbytes > RETURNED_INLINE_BYTES:
            self.answer = frame
            return None
        return super().put(frame, direct)

    def _may_share(self, more: int = 0) -> bool:
        return not self.by_ray and super()._may_share(more)

    def read(self, payload: Payload) -> Frame | None:
        """A frame; None where it is gone. Blocking."""
        if isinstance(payload, list):
            try:
                return ray.get(payload[0])
            except ObjectLostError:
                return None
        return _mapped(payload)


def _mapped(payload: bytes | SharedFrame) -> Frame:
    return np.frombuffer(payload, np.uint8) if isinstance(payload, bytes) else payload.map()


# What went to Ray's store, for as long as the frame lives: it may have several readers.
_references: WeakKeyDictionary[SharedFrame, Payload] = WeakKeyDictionary()


def referenced(payload: Payload) -> Payload:
    """As Ray can carry it. May block: for threads."""
    if not isinstance(payload, SharedFrame):
        return payload
    if payload not in _references:
        _references[payload] = [ray.put(payload.map())]
    return _references[payload]
