"""Connects a client to a run of a server: requests become HTTP, and events a stream that outlives its connections."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, NoReturn, get_args

import msgspec

from asyncflow.client.http import HttpConnection, Patience, new_key
from asyncflow.client.sse import frames_of
from protocols.control.events import CodeReloaded, Event, RunEnded
from protocols.control.problems import TooMany, Unavailable
from protocols.control.runs import Answer, Command

if TYPE_CHECKING:
    from protocols.control.delivery import ServiceStatistics
    from protocols.control.replies import RowsPut
    from protocols.data.columns import Batch
    from protocols.stage import Failure

END = "end"  # the kind of a stream's last frame: no process works on the run any more
KNOWN = frozenset(kind.__name__ for kind in get_args(Event))
_log = logging.getLogger(__name__)


class _Recorded(msgspec.Struct):
    event: Event


class RemoteLink:
    """Implements `client.run.Link` for a run of a server."""

    def __init__(self, connection: HttpConnection, name: str, patience: float) -> None:
        """`patience`: seconds without contact after which a follower gives up."""
        self.path = f"/v1/runs/{name}"
        self.connection = connection
        self._patience = patience

    async def follow(self, cursor: int) -> AsyncGenerator[tuple[int, Event]]:
        """The events from `cursor` on, over lost connections and restarts of the server: none is lost, none twice."""
        patience = Patience(self._patience, random.Random())
        while True:
            was_open = False
            try:
                async with self.connection.stream(f"{self.path}/events", cursor=cursor) as stream:
                    was_open = True
                    async with aclosing(frames_of(stream.aiter_bytes())) as frames:  # type: ignore[type-var]
                        async for frame in frames:
                            if frame.kind == END:
                                return
                            cursor = int(frame.id) if frame.id else cursor
                            if frame.kind in KNOWN:
                                yield cursor, msgspec.json.decode(frame.data, type=_Recorded).event
                            else:
                                _log.warning("an event %s is left out: this asyncflow is too old for it", frame.kind)
                raise Unavailable(f"{self.connection.url}: the stream of events broke off")
            except (Unavailable, TooMany) as error:
                if was_open:  # a stream breaks off soon after its last heartbeat, however long it was open
                    patience.answered()
                await patience.wait_after(error)

    async def pause(self) -> None:
        await self._command("pause")

    async def resume(self) -> None:
        await self._command("resume")

    async def checkpoint(self) -> str:
        return msgspec.convert((await self._command("checkpoint")).result, str)

    async def reload(self) -> CodeReloaded:
        return msgspec.convert((await self._command("reload")).result, CodeReloaded)

    async def stop(self, *, abandon: bool) -> RunEnded:
        return msgspec.convert((await self._command("cancel" if abandon else "drain")).result, RunEnded)

    async def statistics(self) -> list[ServiceStatistics]:
        from protocols.control.delivery import ServiceStatistics

        return await self.connection.get(f"{self.path}/statistics", list[ServiceStatistics])

    def subscribe(self, channel: str) -> AsyncGenerator[tuple[Batch | None, int]]:
        _in_process_only("channels are read")

    def take(self, role: str, most: int) -> AsyncGenerator[Batch]:
        _in_process_only("external roles are answered")

    async def put(self, role: str, answers: Batch | None, failures: Sequence[Failure], seconds: float) -> RowsPut:
        _in_process_only("external roles are answered")

    async def _command(self, command: Command, key: str = "") -> Answer:
        return await self.connection.post(f"{self.path}/{command}", {}, Answer, key or new_key())


def _in_process_only(what: str) -> NoReturn:
    raise NotImplementedError(f"{what} in the process of `asyncflow.launch` only; a server has no route for it yet")
