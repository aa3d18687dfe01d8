"""How services reach each other: three calls, the same in one process and between Ray actors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protocols.control import Delivery, Notice, Refused, Reply, Request

Frame = npt.NDArray[np.uint8]
Payload = Any  # what a Store made of a frame: the frame itself, bytes, or a reference to it


class Store(Protocol):
    """Where frames wait: written once by the producer, read by each consumer without a copy."""

    def put(self, frame: Frame) -> Payload:
        """Keep a frame; what comes back travels beside a message."""
        ...

    async def get(self, payload: Payload) -> Frame:
        """The frame, read-only."""
        ...


class Endpoint(Protocol):
    """A service as others see it."""

    @property
    def name(self) -> str: ...

    async def deliver(self, delivery: Delivery, payload: Payload | None) -> None:
        """Hand rows to a mailbox; returns when there was room for them."""
        ...

    async def request(self, request: Request, payload: Payload | None = None) -> tuple[Reply, Payload | None]:
        """Ask for something and wait for the reply."""
        ...

    async def notices(self) -> list[Notice]:
        """What the service has to report; waits until there is something."""
        ...


class ServiceError(Exception):
    """A service refused a request, or died: names the service, what was asked and why it was not done."""


async def ask(endpoint: Endpoint, request: Request, payload: Payload | None = None) -> tuple[Reply, Payload | None]:
    """`request` that raises ServiceError where the service refuses."""
    reply, answer = await endpoint.request(request, payload)
    if isinstance(reply, Refused):
        raise ServiceError(f"{endpoint.name}: {type(request).__name__}: {reply.error}")
    return reply, answer


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
