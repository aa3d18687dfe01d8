"""A lease that may grant any waiting claim next, and so permits all orders of grants.

The real lease grants in calling order, which is one of them. So an error that no order of grants shows does not happen
under the real lease, and the order in which claims were made is no part of the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from asyncflow.control.device_lease import Claim, PoolLease, shared_leases
from tests.asyncflow.simulation.network import Action

if TYPE_CHECKING:
    from tests.asyncflow.simulation.world import World


class OpenLease(PoolLease):
    """A lease that grants only when `grant` is called."""

    def grant(self, stage: str) -> Claim:
        """Grant the devices to the waiting claim of this stage."""
        self.holder = next(claim for claim in self._queue if claim.stage == stage)
        self._queue.remove(self.holder)
        return self.holder

    def _advance(self) -> Claim | None:
        return None


def open_leases(pools: Mapping[str, str]) -> dict[str, PoolLease]:
    """The same leases as `shared_leases`, as `OpenLease`."""
    leases = {lease.pool: OpenLease(lease.pool) for lease in shared_leases(pools).values()}
    return {service: leases[pool] for service, pool in pools.items() if pool in leases}


class Turns:
    """The part of the world that grants a pool's devices: any waiting claim may be next."""

    def __init__(self, world: World, lease: OpenLease) -> None:
        self._world, self.lease, self.name = world, lease, lease.pool

    def actions(self) -> Iterator[Action]:
        if self.lease.holder is None:
            for claim in self.lease.waiting:
                yield Action(self.name, "grant", claim.stage)

    def do(self, action: Action) -> None:
        """Grant the devices to a stage or an engine."""
        self._world.grant(self.lease.grant(action.item))
