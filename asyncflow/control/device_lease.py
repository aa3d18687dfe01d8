"""The lease of a device pool: colocated services use its devices in turn, first come, first served. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

import msgspec


class Claim(msgspec.Struct, frozen=True):
    """A service's request for the devices, and the stage that will compute."""

    service: str
    ticket: int
    stage: str


class PoolLease:
    """At most one holder, and a FIFO queue of claims; a stage claims when it has all its inputs."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.holder: Claim | None = None
        self._queue: deque[Claim] = deque()

    @property
    def waiting(self) -> list[Claim]:
        """The queued claims, in the order of their grants."""
        return list(self._queue)

    def ask(self, claim: Claim) -> Claim | None:
        """Queue a claim. Returns the claim to grant now, if any."""
        self._queue.append(claim)
        return self._advance()

    def give_back(self, service: str, ticket: int) -> Claim | None:
        """End a claim, held or queued. Returns the claim to grant now, if any."""
        if self.holder is not None and (self.holder.service, self.holder.ticket) == (service, ticket):
            self.holder = None
        else:
            self._queue = deque(c for c in self._queue if (c.service, c.ticket) != (service, ticket))
        return self._advance()

    def forget(self, service: str) -> Claim | None:
        """End all claims of a dead service. Returns the claim to grant now, if any."""
        if self.holder is not None and self.holder.service == service:
            self.holder = None
        self._queue = deque(c for c in self._queue if c.service != service)
        return self._advance()

    def _advance(self) -> Claim | None:
        if self.holder is not None or not self._queue:
            return None
        self.holder = self._queue.popleft()
        return self.holder


def shared_leases(pools: Mapping[str, str]) -> dict[str, PoolLease]:
    """One lease for each pool with more than one service, by service."""
    counts = Counter(pools.values())
    leases = {pool: PoolLease(pool) for pool, count in counts.items() if count > 1}
    return {service: leases[pool] for service, pool in pools.items() if pool in leases}
