"""Endpoint and Store: how services call each other, and where the bytes of their rows are stored.

An endpoint has three calls. They are the same in one process and between Ray actors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protocols.control.delivery import Delivery
from protocols.control.notices import Notice
from protocols.control.replies import Refused, Reply
from protocols.control.requests import Request

Frame = npt.NDArray[np.uint8]
Payload = Any  # what Store.put returns for a frame: the frame itself, its bytes, or a reference


class Store(Protocol):
    """Storage for frames. The producer writes a frame once; each consumer reads it without a copy."""

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        """Store a frame; the payload that is returned travels beside a message. May block: call it in a thread.

        `direct`: the receiver of the message reads the frame itself, so a larger frame may travel inside the message.
        """
        ...

    def piece_bytes(self, nbytes: int, direct: bool) -> int:
        """The most bytes a frame, if rows of `nbytes` should be cut to travel inside the message; 0: do not cut."""
        ...

    async def get(self, payload: Payload) -> Frame:
        """The frame, read-only. Raises PayloadLost if the frame was lost with the process that stored it."""
        ...

    def inline_bytes(self, payload: Payload) -> int:
        """The bytes that travel inside the message itself; 0 for a reference."""
        ...


class Requestable(Protocol):
    """The part of an endpoint that sends requests."""

    @property
    def name(self) -> str: ...

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        """Send a request and wait for the reply."""
        ...


class Endpoint(Requestable, Protocol):
    """A service, as the controller and the other services call it."""

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        """Put rows into a mailbox, with one payload per shard; returns when there was room. Raises ServiceGone."""
        ...

    async def notices(self) -> list[Notice]:
        """The notices that are queued for the controller; waits until there is one."""
        ...


class ServiceError(Exception):
    """A service refused a request, or died. The text names the service, the request and the cause."""


class ServiceGone(ServiceError):
    """The service's process is gone. Its rows have to be sent again to its replacement."""


class PayloadLost(Exception):
    """A frame can't be read any more, because the process that owned it is gone."""


async def get_or_none(store: Store, payload: Payload) -> Frame | None:
    """The frame of a payload; None if it was lost."""
    try:
        return await store.get(payload)
    except PayloadLost:
        return None


async def ask(endpoint: Requestable, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
    """Send a request. Raises ServiceError if the service refuses it."""
    reply, answers = await endpoint.request(request, payloads)
    if isinstance(reply, Refused):
        raise ServiceError(f"{endpoint.name}: {type(request).__name__}: {reply.error}")
    return reply, answers


def causes(error: BaseException) -> str:
    """The type and message of an error; of an exception group those of its leaves, since its own text names none."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(causes(e) for e in error.exceptions))
    return str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"


@asynccontextmanager
async def all_or_error() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises one ServiceError with the causes of all that its tasks raised."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except* ServiceError as errors:
        raise ServiceError("; ".join(str(error) for error in errors.exceptions)) from errors
