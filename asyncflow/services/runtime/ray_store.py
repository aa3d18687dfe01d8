"""RayStore keeps frames between Ray actors: in the message, in shared memory, or in Ray's object store.

    up to the inline limit      bytes, inside the message
    one node, within the bound  a shared frame (shared.py), whose descriptor travels on the socket (wire.py)
    otherwise                   an object reference in a list, so that Ray passes it on and only the reader fetches it

Ray's store reaches other nodes, and spills to disk beyond its memory. Shared memory does neither, so it is bounded. But
reading it asks no owner and copies nothing, and it outlives its writer.
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
DIRECT_BYTES = 1 << 16  # up to this size a copy in the message is quicker than a store and its bookkeeping


class RayStore:
    """Implements `Store`."""

    def __init__(self, inline_bytes: int, shared_bytes: int = 0) -> None:
        """`shared_bytes`: the shared memory this process may hold; 0 if the processes are on several nodes."""
        self._inline_limit, self.shared_bytes = inline_bytes, shared_bytes

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        if frame.nbytes <= (max(self._inline_limit, DIRECT_BYTES) if direct else self._inline_limit):
            return frame.tobytes()
        if holdings().room(self.shared_bytes, frame.nbytes):
            with contextlib.suppress(OSError):  # no memory or no descriptor: use Ray's store, which can spill
                return SharedFrame.of(frame)
        return [ray.put(frame)]

    def piece_bytes(self, nbytes: int, direct: bool) -> int:
        """Cut small messages that a coordinator of several ranks passes on, so that they travel without a store."""
        return self._inline_limit if not direct and self._inline_limit < nbytes <= DIRECT_BYTES else 0

    async def get(self, payload: Payload) -> Frame:
        if isinstance(payload, list):
            try:
                return await payload[0]
            except ObjectLostError as error:
                raise PayloadLost(str(error)) from error
        return np.frombuffer(payload, np.uint8) if isinstance(payload, bytes) else payload.map()

    def inline_bytes(self, payload: Payload) -> int:
        return len(payload) if isinstance(payload, bytes) else 0

    async def by_reference(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Payloads that Ray can carry: frames in shared memory are copied to its store."""
        if not any(isinstance(payload, SharedFrame) for payload in payloads):
            return list(payloads)
        return await asyncio.to_thread(lambda: [referenced(payload) for payload in payloads])

    async def admit(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Keep received payloads: unchanged while shared memory is within its bound, else by reference."""
        return list(payloads) if holdings().room(self.shared_bytes) else await self.by_reference(payloads)


class ReplyStore(RayStore):
    """Stores a rank's reply to one call that arrived through Ray, so that the reply leaves through Ray.

    `apart`: the call is a large one. The reply's first large frame is returned as a value of its own, so that readers
    need not ask its owner. It must exceed RETURNED_INLINE_BYTES: Ray stores such a value by itself, while a smaller one
    would travel through the coordinator.
    """

    def __init__(self, inline_bytes: int, *, apart: bool = False) -> None:
        super().__init__(inline_bytes)
        self._apart = apart
        self.frame: Frame | None = None  # the one to return as a value

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        if self._apart and self.frame is None and frame.nbytes > RETURNED_INLINE_BYTES:
            self.frame = frame
            return None
        return super().put(frame, direct)


# Shared frames that were copied to Ray's store, for as long as they live: a frame may have several readers.
_references: WeakKeyDictionary[SharedFrame, Payload] = WeakKeyDictionary()


def referenced(payload: Payload) -> Payload:
    """A payload that Ray can carry. May block: call it in a thread."""
    if not isinstance(payload, SharedFrame):
        return payload
    if payload not in _references:
        _references[payload] = [ray.put(payload.map())]
    return _references[payload]
