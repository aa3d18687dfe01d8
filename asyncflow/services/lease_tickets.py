"""LeaseTickets: a service's requests for the devices of its pool, which the controller grants in order of request."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncflow.services.reports import Reports
from protocols.control.notices import LeaseAsked, LeaseReturned


class LeaseTickets:
    """The requests of one service. Without `leased` no other service shares its devices, and it needs no grant."""

    def __init__(self, reports: Reports, *, leased: bool) -> None:
        self._reports = reports
        self._leased = leased
        self._tickets = itertools.count()
        self._grants: dict[int, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def held(self, stage: str) -> AsyncIterator[None]:
        """Hold the pool's devices for a stage."""
        if not self._leased:
            yield
            return
        ticket = next(self._tickets)
        granted = self._grants[ticket] = asyncio.get_running_loop().create_future()
        self._reports.notify(LeaseAsked(ticket, stage))
        try:
            await granted
            yield
        finally:
            del self._grants[ticket]
            self._reports.notify(LeaseReturned(ticket))

    def grant(self, ticket: int) -> None:
        """Grant a requested lease. A ticket that nobody waits for any more was returned already."""
        future = self._grants.get(ticket)
        if future is not None and not future.done():
            future.set_result(None)
