"""A Ray actor as others call it: a service, the ranks of one, and what becomes of each error on the way.

All but references goes past Ray where both processes are on one node: over the wire (wire.py), whose caller falls
back on Ray only where nothing was sent. So whatever is asked is asked once.
"""

from __future__ import annotations

import contextlib
import os
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
from protocols.control.requests import RankAnswer, RankRequest, Reply, Request

LARGE_CALL_BYTES = 1 << 20  # from here on a second value of the call costs less than what it spares

_replies, _notices = msgspec.msgpack.Decoder(Reply), msgspec.msgpack.Decoder(list[Notice])
_rank_replies, _rank_answers = msgspec.msgpack.Decoder(RankReply), msgspec.msgpack.Decoder(RankAnswer)


class Peer:
    """An actor in another process: over the wire where it is on this node and no reference travels, or by Ray."""

    def __init__(self, name: str, actor: Any, wire: str, store: RayStore) -> None:
        """`wire`: the name under which the actor listens; "": nowhere, all goes by Ray."""
        self.name, self.actor = name, actor
        self._wire = Wire(wire) if wire else None
        self._store = store

    async def call(
        self, method: str, body: bytes, payloads: Sequence[Payload], what: str = "", *, large: bool = False
    ) -> tuple[bytes, list[Payload]]:
        """Call a method that takes and gives a body and payloads. Raises as `answered` does; `what` names the call.

        `large`: the answer is, so that by Ray its method of that name serves better, see `RankActor.call_large`.
        """
        what = what or method
        if self._wire is not None and travels(payloads, body):
            with contextlib.suppress(NotListening):
                reply, answers = await self._over(self._wire, method, body, payloads, what)
                return reply, await self._store.admit(answers)
        references = await self._store.by_reference(payloads)
        if not large:
            return await called(self.name, what, getattr(self.actor, method), body, references)
        answer, value = getattr(self.actor, f"{method}_large").options(num_returns=2).remote(body, references)
        reply, answers = await answered(self.name, what, answer)
        return reply, [[value] if a is None else a for a in answers]

    def close(self) -> None:
        """End the connection to it."""
        if self._wire is not None:
            self._wire.close()

    async def _over(
        self, wire: Wire, method: str, body: bytes, payloads: Sequence[Payload], what: str
    ) -> tuple[bytes, list[Payload]]:
        try:
            answer: Answered = await wire.call(method, body, payloads)
        except ConnectionLost as error:
            await called(self.name, what, self.actor.__ray_ready__)  # which raises where its process is gone
            raise ServiceError(f"{self.name}: {what}: {error}; it may have been done") from error
        if answer.error is not None:
            raise ServiceError(f"{self.name}: {what}: {answer.error}")
        if answer.kept:
            return answer.body, await called(self.name, what, self.actor.collect, answer.kept)
        return answer.body, list(answer.payloads)


class RayEndpoint:
    """A service in another process."""

    def __init__(self, name: str, actor: Any, wire: str, store: RayStore) -> None:
        """`wire`: where it listens, another one after a restart; "": nowhere. `store`: of the process that calls."""
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
        """End the connection to it."""
        self._peer.close()


class RayRanks:
    """The ranks of a service, each an actor of its own. Implements `Ranks`.

    They fail together: where one is gone the coordinator ends its own process, which is what the controller sees.
    """

    def __init__(
        self, name: str, actors: Sequence[Any], wires: Sequence[str], store: RayStore, *, meet: bool = False
    ) -> None:
        """`wires`: where they listen, see `Peer`; `meet`: they work together, so they have to find each other."""
        self._name, self._actors, self._meet = name, actors, meet
        self._peers = [
            Peer(f"{name} rank {rank}", actor, wire, store)
            for rank, (actor, wire) in enumerate(zip(actors, wires, strict=True))
        ]

    async def start(self) -> None:
        first = self._actors[0]
        meeting = await called(f"{self._name} rank 0", "host meeting", first.create_store) if self._meet else ""
        async with all_or_error() as group:
            for rank, actor in enumerate(self._actors):
                starting = called(f"{self._name} rank {rank}", "start", actor.start, meeting)
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
        async with all_or_error() as group:  # side by side: ranks may wait for each other to leave their world
            for rank, actor in enumerate(self._actors):
                group.create_task(called(f"{self._name} rank {rank}", "stop", actor.stop), name=f"stop rank {rank}")


def _end_with(gone: ServiceGone) -> NoReturn:
    """A service ends with any of its ranks: its process too, which is what the controller sees."""
    sys.stderr.write(f"{gone}: the service ends with it\n")
    sys.stderr.flush()
    os._exit(1)


async def called(name: str, what: str, method: Any, *arguments: Any) -> Any:
    """Call an actor's method. Raises as `answered` does."""
    return await answered(name, what, method.remote(*arguments))


async def answered(name: str, what: str, answer: Any) -> Any:
    """What an actor answers. Raises ServiceError with its cause, ServiceGone where its process is gone."""
    try:
        return await answer
    except RayTaskError as error:
        raise ServiceError(f"{name}: {what}: {causes(error.cause)}") from error
    except ActorUnavailableError as error:  # it may live: whoever asked can't know what was done
        raise ServiceError(f"{name}: {what}: can't be reached ({error})") from error
    except RayActorError as error:
        raise ServiceGone(f"{name}: {what}: its process is gone ({type(error).__name__}: {error})") from error
    except RayError as error:
        raise ServiceError(f"{name}: {what}: {type(error).__name__}: {error}") from error
