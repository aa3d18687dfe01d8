"""A StageContext outside of a service, and a fake consumer that records its deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from asyncflow.observe.exporter import Exporter
from asyncflow.services.channels.endpoint import Frame, Payload, PayloadLost, ServiceGone
from asyncflow.services.ranks.rank import LocalRanks
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.runtime.local_store import LocalStore
from asyncflow.services.stage_context import StageContext
from protocols.control.delivery import Delivery
from protocols.control.notices import Notice
from protocols.control.replies import Reply
from protocols.control.requests import Request
from protocols.data import codec
from protocols.data.columns import Batch


class Consumer:
    """Records deliveries; each waits until the gate is open. Implements `Endpoint`."""

    def __init__(self, name: str, *, is_open: bool = True, is_gone: bool = False) -> None:
        self.name = name
        self.is_gone = is_gone
        self.gate = asyncio.Event()
        self.arrived: list[tuple[Delivery, list[Batch]]] = []
        if is_open:
            self.gate.set()

    @property
    def samples(self) -> list[list[int]]:
        """The sample ids of each delivery, tombstones last."""
        return [
            [s for batch in batches for s in batch.sample_ids.tolist()] + [f.sample_id for f in delivery.failures]
            for delivery, batches in self.arrived
        ]

    async def deliver(self, delivery: Delivery, payloads: Sequence[Payload]) -> None:
        if self.is_gone:
            raise ServiceGone(f"{self.name} is gone")
        await self.gate.wait()
        self.arrived.append((delivery, [codec.decode(payload) for payload in payloads]))

    async def request(self, request: Request, payloads: Sequence[Payload] = ()) -> tuple[Reply, list[Payload]]:
        raise NotImplementedError

    async def notices(self) -> list[Notice]:
        raise NotImplementedError


class SomeAreGone(LocalStore):
    """A store in which a payload of None stands for a frame whose owner has died."""

    async def get(self, payload: Payload) -> Frame:
        if payload is None:
            raise PayloadLost("its owner is gone")
        return await super().get(payload)


@asynccontextmanager
async def hosted(
    spec: ServiceSpec, *consumers: Consumer, store: LocalStore | None = None
) -> AsyncIterator[StageContext]:
    """A StageContext with running ranks; both are closed at the end."""
    store = store or LocalStore()
    context = StageContext(spec, store, Exporter(spec.name))
    context.peers = {consumer.name: consumer for consumer in consumers}
    context.ranks = LocalRanks(spec, store)
    await context.ranks.start()
    try:
        yield context
    finally:
        await context.ranks.stop()
        context.close()
        store.close()
