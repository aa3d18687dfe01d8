"""How services reach each other: three calls, the same in one process and between Ray actors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protocols.control.delivery import Delivery
from protocols.control.notices import Notice
from protocols.control.requests import Refused, Reply, Request

Frame = npt.NDArray[np.uint8]
Payload = Any  # what a Store made of a frame: the frame itself, bytes, or a reference to it


class Store(Protocol):
    """Where frames wait: written once by the producer, read by each consumer without a copy."""

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        """Keep a frame; what comes back travels beside a message. May block: for compute threads.

        `direct`: whoever gets the message reads the frame itself, so that more of it may travel inside.
        """
        ...

    def piece_bytes(self, nbytes: int, direct: bool) -> int:
        """The most bytes of a frame of a message of `nbytes`, for it to travel inside, cut; 0: leave it whole."""
        ...

    async def get(self, payload: Payload) -> Frame:
        """The frame, read-only. Raises PayloadLost where the process that put it is gone, and the frame with it."""
        ...

    def inline_bytes(self, payload: Payload) -> int:
        """Bytes that travel inside the message itself, 0 for a reference."""
        ...


class Requestable(Protocol):
    """A service as those see it who only ask."""

    @property
    def name(self) -> str: ...

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        """Ask for something and wait for the reply."""
        ...


class Endpoint(Requestable, Protocol):
    """A service as others see it."""

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        """Hand rows to a mailbox, a payload a shard; returns when there was room. Raises ServiceGone."""
        ...

    async def notices(self) -> list[Notice]:
        """What the service has to report; waits until there is something."""
        ...


class ServiceError(Exception):
    """A service refused a request, or died: names the service, what was asked and why it was not done."""


class ServiceGone(ServiceError):
    """The service's process is gone: what it held has to be sent again to its successor."""


class PayloadLost(Exception):
    """A frame can't be read any more: the process that owned it is gone."""


async def ask(endpoint: Requestable, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
    """`request` that raises ServiceError where the service refuses."""
    reply, answers = await endpoint.request(request, payloads)
    if isinstance(reply, Refused):
        raise ServiceError(f"{endpoint.name}: {type(request).__name__}: {reply.error}")
    return reply, answers


def causes(error: BaseException) -> str:
    """What happened: the leaves of a group, each once, by type and message. A group's own text names none of them."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(causes(e) for e in error.exceptions))
    return str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"


@asynccontextmanager
async def all_or_error() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose ServiceErrors come out as one, with every cause."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except* ServiceError as errors:
        raise ServiceError("; ".join(str(error) for error in errors.exceptions)) from errors
