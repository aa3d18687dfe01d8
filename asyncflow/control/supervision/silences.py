"""Asks every service at all times whether it is there, and kills one that does not answer: it is as good as dead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping

from asyncflow.control.supervision.liveness import Liveness, Silence
from asyncflow.services.channels.endpoint import Endpoint, ServiceError, ServiceGone
from protocols.control.events import ServiceSilent
from protocols.control.replies import Done
from protocols.control.requests import Ping

PING_EVERY_SECONDS = 2.0  # after an answer


class Silences:
    """The silences of a run's services. `services` holds the current process of each."""

    def __init__(self, services: Mapping[str, Endpoint], liveness: Liveness, kill: Callable[[str], None]) -> None:
        self._services, self._liveness, self._kill = services, liveness, kill
        self.memory: dict[str, dict[str, float]] = {}  # service -> that of its processes, at its last answer
        self._ended: dict[str, Silence] = {}  # services that were killed for it and are not replaced yet

    async def ping(self, name: str) -> None:
        """Ask one service, for ever."""
        while True:
            self._liveness.asked(name)
            with contextlib.suppress(ServiceError):  # one that is gone is the concern of who reads its notices
                reply, _ = await self._services[name].request(Ping())
                if isinstance(reply, Done):
                    self.memory[name] = reply.values
            self._liveness.answered(name)
            await asyncio.sleep(PING_EVERY_SECONDS)

    def elapse(self, seconds: float) -> Iterator[ServiceSilent]:
        """Time has passed: kill the services that have been silent for too long, and report it."""
        for silence in self._liveness.elapse(seconds):
            yield ServiceSilent(service=silence.service, seconds=silence.seconds, ended=silence.ends)
            if silence.ends:
                self._ended[silence.service] = silence
                self._kill(silence.service)  # all that wait for it learn that it is gone

    def cause_of(self, name: str, gone: ServiceGone) -> ServiceGone:
        """Why a service is gone: its silence, if it was killed for that."""
        silence = self._ended.pop(name, None)
        if silence is None:
            return gone
        return ServiceGone(f"{name}: it had not answered for {silence.seconds:.0f} s and was killed")

    @property
    def current(self) -> dict[str, float]:
        """The services that are silent now -> seconds, the longest first."""
        return self._liveness.silent
