"""A lease that may grant any waiting claim next: all orders of grants, while the real lease has only one.

Whatever happens under the real lease happens under this one, too, for a queue is one way to choose. So what goes
wrong in no order of grants does not go wrong in the order of asking; and orders of asking need not be told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from asyncflow.control.device_lease import Claim, PoolLease, shared_leases
from tests.asyncflow.simulation.network import Action

if TYPE_CHECKING:
    from tests.asyncflow.simulation.world import World


class OpenLease(PoolLease):
    """Grants nobody by itself."""

    def grant(self, stage: str) -> Claim:
        """One of those who wait is next."""
        self.holder = next(claim for claim in self._queue if claim.stage == stage)
        self._queue.remove(self.holder)
        return self.holder

    def _advance(self) -> Claim | None:
        return None


def open_leases(pools: Mapping[str, str]) -> dict[str, PoolLease]:
    """As the real ones, but for who is next."""
    leases = {lease.pool: OpenLease(lease.pool) for lease in shared_leases(pools).values()}
    return {service: leases[pool] for service, pool in pools.items() if pool in leases}


class Turns:
    """Who may be next on the devices of a pool."""

    def __init__(self, world: World, lease: OpenLease) -> None:
        self._world, self.lease, self.name = world, lease, lease.pool

    def actions(self) -> Iterator[Action]:
        if self.lease.holder is None:
            for claim in self.lease.waiting:
                yield Action(self.name, "grant", claim.stage)

    def do(self, action: Action) -> None:
        """The devices are a stage's, or an engine's, own."""
        self._world.grant(self.lease.grant(action.item))
