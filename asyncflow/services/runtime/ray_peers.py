"""Callers of Ray actors: of a service, and of its ranks. They turn Ray's errors into ServiceError and ServiceGone.

If both processes are on one node, a call without object references goes over a socket (wire.py). It falls back on Ray
only if nothing was sent, so no call is made twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from asyncflow.services.channels.endpoint import Payload, ServiceError, ServiceGone, all_or_error, causes
from asyncflow.services.runtime.ray_store import RayStore
from asyncflow.services.runtime.wire import Answered, ConnectionLost, NotListening, Wire, travels
from protocols.control.delivery import Delivery, RankCall, RankReply
from protocols.control.notices import Notice
from protocols.control.replies import RankAnswer, Reply
from protocols.control.requests import RankRequest, Request

LARGE_CALL_BYTES = 1 << 20  # above this, returning a frame as a second value is quicker than an object of its own

_POSSIBLE_CAUSES = re.compile(r" (?:Some common causes|There are some potential)")  # how Ray's list of them begins

_replies, _notices = msgspec.msgpack.Decoder(Reply), msgspec.msgpack.Decoder(list[Notice])
_rank_replies, _rank_answers = msgspec.msgpack.Decoder(RankReply), msgspec.msgpack.Decoder(RankAnswer)


class Peer:
    """Calls an actor: over its socket if it is on this node and no reference travels, else through Ray."""

    def __init__(self, name: str, actor: Any, wire: str, store: RayStore) -> None:
        """`wire`: the name of the actor's socket; "": it has none, so all calls go through Ray."""
        self.name, self.actor = name, actor
        self._wire = Wire(wire) if wire else None
        self._store = store

    async def call(
        self, method: str, body: bytes, payloads: Sequence[Payload], what: str = "", *, large: bool = False
    ) -> tuple[bytes, list[Payload]]:
        """Have the actor answer `method`, with a body and payloads. Raises as `answered` does; `what` names the call.

        `large`: a large answer is expected, see `RankActor.call_large`.
        """
        what = what or method
        if self._wire is not None and travels(payloads, body):
            with contextlib.suppress(NotListening):
                reply, answers = await self._over(self._wire, method, body, payloads, what)
                return reply, await self._store.admit(answers)
        references = await self._store.by_reference(payloads)
        if not large:
            return await called(self.name, what, self.actor.call, method, body, references)
        answer, value = self.actor.call_large.options(num_returns=2).remote(method, body, references)
        reply, answers = await answered(self.name, what, answer)
        return reply, [[value] if a is None else a for a in answers]

    def close(self) -> None:
        """Close the connection to the actor."""
        if self._wire is not None:
            self._wire.close()

    async def _over(
        self, wire: Wire, method: str, body: bytes, payloads: Sequence[Payload], what: str
    ) -> tuple[bytes, list[Payload]]:
        try:
            answer: Answered = await wire.call(method, body, payloads)
        except ConnectionLost as error:
            await called(self.name, what, self.actor.__ray_ready__)  # raises ServiceGone if its process is gone
            raise ServiceError(f"{self.name}: {what}: {error}; it may have been done") from error
        if answer.error is not None:
            raise ServiceError(f"{self.name}: {what}: {answer.error}")
        if answer.kept:
            return answer.body, await called(self.name, what, self.actor.collect, answer.kept)
        return answer.body, list(answer.payloads)


class RayEndpoint:
    """A service in another process. Implements `Endpoint`."""

    def __init__(self, name: str, actor: Any, wire: str, store: RayStore) -> None:
        """`wire`: the name of its socket, which changes when it is replaced; "": none. `store`: the caller's."""
        self.name, self.wire = name, wire
        self._peer = Peer(name, actor, wire, store)

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        await self._peer.call("deliver", msgspec.msgpack.encode(delivery), payloads)

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        reply, answers = await self._peer.call("request", msgspec.msgpack.encode(request), payloads)
        return _replies.decode(reply), answers

    async def notices(self) -> list[Notice]:
        notices, _ = await self._peer.call("notices", b"", [])
        return _notices.decode(notices)

    def close(self) -> None:
        """Close the connection to the service."""
        self._peer.close()


class RayRanks:
    """The ranks of a service, each an actor of its own. Implements `Ranks`.

    They fail together: if one is gone, the coordinator ends its own process, and the controller sees that.
    """

    def __init__(
        self, name: str, actors: Sequence[Any], wires: Sequence[str], store: RayStore, *, rendezvous: bool = False
    ) -> None:
        """`wires`: the names of their sockets, see `Peer`; `rendezvous`: they join one process group."""
        self._name, self._actors, self._rendezvous = name, actors, rendezvous
        self._peers = [
            Peer(f"{name} rank {rank}", actor, wire, store)
            for rank, (actor, wire) in enumerate(zip(actors, wires, strict=True))
        ]

    async def start(self) -> None:
        first = self._actors[0]
        address = (
            await called(f"{self._name} rank 0", "create the store", first.create_store) if self._rendezvous else ""
        )
        async with all_or_error() as group:
            for rank, actor in enumerate(self._actors):
                starting = called(f"{self._name} rank {rank}", "start", actor.start, address)
                group.create_task(starting, name=f"start rank {rank}")

    async def call(self, rank: int, call: RankCall, payloads: list[Payload]) -> tuple[RankReply, list[Payload]]:
        packed, large = msgspec.msgpack.encode(call), call.nbytes >= LARGE_CALL_BYTES
        try:
            reply, answers = await self._peers[rank].call("call", packed, payloads, call.stage, large=large)
        except ServiceGone as gone:
            _end_with(gone)
        return _rank_replies.decode(reply), answers

    async def ask(self, rank: int, request: RankRequest) -> tuple[RankAnswer, list[Payload]]:
        packed, what = msgspec.msgpack.encode(request), type(request).__name__
        try:
            answer, payloads = await self._peers[rank].call("ask", packed, [], what)
        except ServiceGone as gone:
            _end_with(gone)
        return _rank_answers.decode(answer), payloads

    async def stop(self) -> None:
        async with all_or_error() as group:  # concurrently: ranks may wait for each other to leave the process group
            for rank, actor in enumerate(self._actors):
                group.create_task(called(f"{self._name} rank {rank}", "stop", actor.stop), name=f"stop rank {rank}")


def _end_with(gone: ServiceGone) -> NoReturn:
    """End this process, since a service ends with any of its ranks; the controller sees that it is gone."""
    sys.stderr.write(f"{gone}: the service ends with it\n")
    sys.stderr.flush()
    os._exit(1)


def _cause_of(error: RayActorError) -> str:
    """What Ray knows of an actor's end, in one line: without its ids, and without a list of what may be the causes."""
    told = " ".join(str(error).split())
    _, found, cause = told.partition("The actor is dead because ")
    return _POSSIBLE_CAUSES.split(cause if found else f"{type(error).__name__}: {told}")[0]


async def called(name: str, what: str, method: Any, *arguments: Any) -> Any:
    """Call an actor's method. Raises as `answered` does."""
    return await answered(name, what, method.remote(*arguments))


async def answered(name: str, what: str, answer: Any) -> Any:
    """Wait for an actor's answer. Raises ServiceError with its cause, ServiceGone if its process is gone."""
    try:
        return await answer
    except RayTaskError as error:
        raise ServiceError(f"{name}: {what}: {causes(error.cause)}") from error
    except ActorUnavailableError as error:  # it may live: the caller can't know what was done
        raise ServiceError(f"{name}: {what}: can't be reached ({error})") from error
    except RayActorError as error:
        raise ServiceGone(f"{name}: {what}: its process is gone ({_cause_of(error)})") from error
    except RayError as error:
        raise ServiceError(f"{name}: {what}: {type(error).__name__}: {error}") from error
