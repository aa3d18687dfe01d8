"""A service across its deaths, as those who send it requests see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asyncflow.control.events import Notifier
from asyncflow.services.channels.endpoint import Endpoint, Payload, ServiceGone
from protocols.control.replies import Reply
from protocols.control.requests import Request


class WithRetry:
    """Repeats to a successor what one process could not answer. Implements `Requestable`."""

    def __init__(self, name: str, ready: Mapping[str, Endpoint], ready_changed: Notifier, may_die: bool) -> None:
        self.name = name
        self._ready, self._ready_changed, self._may_die = ready, ready_changed, may_die

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        while True:
            service = self._ready[self.name]
            try:
                return await service.request(request, payloads)
            except ServiceGone:
                if not self._may_die:
                    raise
                while self._ready[self.name] is service:  # the task that follows it replaces it, or ends the run
                    await self._ready_changed.changed()
