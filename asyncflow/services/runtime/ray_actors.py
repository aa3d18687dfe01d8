"""The Ray actors: a service's front, its ranks, and how each is called. Bytes in, bytes out.

A frame is put once by the rank that made it; messages carry its reference inside a list, so that Ray hands the
reference on and only the rank that reads it maps the bytes. Ray's own envelope carries bytes and references,
nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayError, RayTaskError

from asyncflow.services.endpoint import (
    Endpoint,
    Frame,
    Payload,
    PayloadLost,
    ServiceError,
    ServiceGone,
    all_or_error,
)
from asyncflow.services.rank import Rank
from asyncflow.services.service import ModelService
from asyncflow.services.spec import ServiceSpec
from asyncflow.services.workplace import build
from protocols.control import Notice, Reply, Request
from protocols.delivery import Delivery, RankCall, RankReply

LARGE_CALL_BYTES = 1 << 20  # from here on a second value of the call costs less than what it spares
RETURNED_INLINE_BYTES = 128 << 10  # above Ray's own limit of 100 KiB for values that travel inside an answer
DIRECT_BYTES = 1 << 16  # up to here a copy in the message is quicker than Ray's store and its bookkeeping


class RayStore:
    """Small frames inline as bytes, larger ones as a reference in a list. Ray spills what exceeds its memory."""

    def __init__(self, inline_bytes: int) -> None:
        self._inline_bytes = inline_bytes

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        inline = frame.nbytes <= (max(self._inline_bytes, DIRECT_BYTES) if direct else self._inline_bytes)
        return frame.tobytes() if inline else [ray.put(frame)]

    async def get(self, payload: Payload) -> Frame:
        if isinstance(payload, bytes):
            return np.frombuffer(payload, np.uint8)
        try:
            return await payload[0]
        except ObjectLostError as error:
            raise PayloadLost(str(error)) from error

    def inline_bytes(self, payload: Payload) -> int:
        return len(payload) if isinstance(payload, bytes) else 0


class AnsweringStore(RayStore):
    """A rank's: the first large frame of a large call leaves as a value of it, which spares Ray an owner to ask.

    Only frames that Ray puts into its store by itself: smaller values would travel through the front.
    """

    answers = False  # while a large call is worked on
    answer: Frame | None = None

    def put(self, frame: Frame, direct: bool = False) -> Payload:
        if self.answers and self.answer is None and frame.nbytes > RETURNED_INLINE_BYTES:
            self.answer = frame
            return None
        return super().put(frame, direct)

    def take_answer(self) -> Frame | None:
        """The frame for which `put` gave None since the last call."""
        answer, self.answer = self.answer, None
        return answer


class RayEndpoint:
    """A service in another process."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.actor = actor

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        await called(self.name, "deliver", self.actor.deliver, msgspec.msgpack.encode(delivery), list(payloads))

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        packed = msgspec.msgpack.encode(request)
        reply, answers = await called(self.name, "request", self.actor.request, packed, list(payloads))
        return msgspec.msgpack.decode(reply, type=Reply), answers

    async def notices(self) -> list[Notice]:
        return msgspec.msgpack.decode(await called(self.name, "notices", self.actor.notices), type=list[Notice])


class RayRanks:
    """The ranks of a service, each an actor of its own. Implements `Ranks`.

    They fail together: where one is gone the front ends its own process, which is what the controller sees.
    """

    def __init__(self, name: str, actors: Sequence[Any]) -> None:
        self._name, self._actors = name, actors

    async def start(self) -> None:
        async with all_or_error() as group:
            for rank, actor in enumerate(self._actors):
                group.create_task(called(f"{self._name} rank {rank}", "start", actor.start), name=f"start rank {rank}")

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        actor, name, packed = self._actors[rank], f"{self._name} rank {rank}", msgspec.msgpack.encode(call)
        try:
            if call.nbytes < LARGE_CALL_BYTES:
                reply, answers = await called(name, call.stage, actor.call, packed, payloads)
                return msgspec.msgpack.decode(reply, type=RankReply), answers
            answer, large = actor.call_large.options(num_returns=2).remote(packed, payloads)
            reply, answers = await answered(name, call.stage, answer)
        except ServiceGone as gone:
            sys.stderr.write(f"{gone}: the service ends with it\n")
            sys.stderr.flush()
            os._exit(1)
        return msgspec.msgpack.decode(reply, type=RankReply), [[large] if a is None else a for a in answers]

    async def stop(self) -> None:
        for rank, actor in enumerate(self._actors):
            await called(f"{self._name} rank {rank}", "stop", actor.stop)


async def called(name: str, what: str, method: Any, *arguments: Any) -> Any:
    """Call an actor's method. Raises as `answered` does."""
    return await answered(name, what, method.remote(*arguments))


async def answered(name: str, what: str, answer: Any) -> Any:
    """What an actor answers. Raises ServiceError with its cause, ServiceGone where its process is gone."""
    try:
        return await answer
    except RayTaskError as error:
        raise ServiceError(f"{name}: {what}: {error.cause}") from error
    except ActorUnavailableError as error:  # it may live: whoever asked can't know what was done
        raise ServiceError(f"{name}: {what}: can't be reached ({error})") from error
    except RayActorError as error:
        raise ServiceGone(f"{name}: {what}: its process is gone ({type(error).__name__}: {error})") from error
    except RayError as error:
        raise ServiceError(f"{name}: {what}: {type(error).__name__}: {error}") from error


class ServiceActor:
    """The Ray actor around a ModelService."""

    def __init__(self, spec: bytes, ranks: Sequence[Any]) -> None:
        self._spec = msgspec.msgpack.decode(spec, type=ServiceSpec)
        log_to(self._spec.log_path)
        several = RayRanks(self._spec.name, ranks) if ranks else None
        self._service = ModelService(self._spec, RayStore(self._spec.inline_bytes), several)

    async def start(self) -> tuple[str, int]:
        """(address, port) of the metrics endpoint"""
        host = ray.util.get_node_ip_address() if self._spec.metrics_host == "node" else self._spec.metrics_host
        return host, await self._service.start(host)

    async def connect(self, actors: Mapping[str, Any]) -> None:
        """Say where the others are; again when one of them was restarted."""
        peers: dict[str, Endpoint] = {name: RayEndpoint(name, actor) for name, actor in actors.items()}
        self._service.connect({**peers, self._spec.name: self._service})

    async def deliver(self, delivery: bytes, payloads: list[Payload]) -> None:
        await self._service.deliver(msgspec.msgpack.decode(delivery, type=Delivery), payloads)

    async def request(self, request: bytes, payloads: list[Payload]) -> tuple[bytes, list[Payload]]:
        reply, answers = await self._service.request(msgspec.msgpack.decode(request, type=Request), payloads)
        return msgspec.msgpack.encode(reply), answers

    async def notices(self) -> bytes:
        return msgspec.msgpack.encode(await self._service.notices())

    async def stop(self) -> None:
        await self._service.stop()


class RankActor:
    """The Ray actor around one rank of a service that has several: one call after the other, in its main thread."""

    def __init__(self, spec: bytes, rank: int) -> None:
        self._spec = msgspec.msgpack.decode(spec, type=ServiceSpec)
        self._number = rank
        if self._spec.log_path:
            path = Path(self._spec.log_path)
            log_to(str(path.with_name(f"{path.stem}-{rank}{path.suffix}")))

    def start(self) -> None:
        """Load the model."""
        self._workplace = build(self._spec, self._number)
        self._store = AnsweringStore(self._spec.inline_bytes)
        self._rank = Rank(self._spec, self._workplace, self._store, None, self._number)

    def call(self, call: bytes, payloads: list[Payload]) -> tuple[bytes, list[Payload]]:
        """One part of a firing: the reply with its payloads."""
        frames = [_frame_of(payload) for payload in payloads]
        reply, answers = self._rank.work(msgspec.msgpack.decode(call, type=RankCall), frames)
        return msgspec.msgpack.encode(reply), answers

    def call_large(self, call: bytes, payloads: list[Payload]) -> tuple[tuple[bytes, list[Payload]], Frame | None]:
        """The same, and beside it the frame that stands as None among the payloads."""
        self._store.answers = True
        try:
            return self.call(call, payloads), self._store.take_answer()
        finally:
            self._store.answers = False

    def stop(self) -> None:
        """Free the model."""
        self._workplace.close()


def _frame_of(payload: Payload) -> Frame | None:
    """A frame, mapped; None where it is gone."""
    if isinstance(payload, bytes):
        return np.frombuffer(payload, np.uint8)
    try:
        return ray.get(payload[0])
    except ObjectLostError:
        return None


def log_to(path: str) -> None:
    """Send this process's output to its own log file."""
    if path:
        log = Path(path).open("a", buffering=1)  # noqa: SIM115 - it is open for as long as the process lives
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = log, log
