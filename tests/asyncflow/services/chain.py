"""A pipeline of three small services, on any runtime:

    source (the test) -> a (four ranks) -> b (one rank) -> c, which reports a PromptSettled for every row

The test takes the controller's part: it delivers rows, sends requests and reads notices. Both a and b double the
values.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncflow.services.channels.endpoint import Endpoint, ask
from asyncflow.services.channels.shard_refs import ShardRef, pack
from asyncflow.services.ranks.spec import ServiceSpec, Target
from asyncflow.services.runtime import Runtime
from asyncflow.services.runtime.local import LocalRuntime
from protocols.control.delivery import Delivery, EdgeStatistics, ServiceStatistics
from protocols.control.notices import PromptSettled
from protocols.control.replies import BatchClosed, Done, Statistics
from protocols.control.requests import BeginTerm, CloseBatch, EndPrompts, GetStatistics, Redeliver
from protocols.data.columns import Batch
from protocols.data.ids import sample_id
from protocols.layout.topology import Topology
from tests.asyncflow.services import specs

A_EDGE, B_EDGE, C_EDGE = "a.double#1.0", "b.double#1.0", "c.keep#1.0"
PATIENCE_SECONDS = 60.0


def samples_of(*prompts: int) -> list[int]:
    """The ids of the prompts' samples; each prompt has one."""
    return [sample_id(prompt, 0) for prompt in prompts]


def chain_specs(a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> list[ServiceSpec]:
    """The specs of the three services; `a` and `b` hold fields to change."""
    first = specs.stage("a.double#1", outputs=[Target("b", B_EDGE)])
    second = specs.stage("b.double#1", sources=["a.double#1"], outputs=[Target("c", C_EDGE)])
    last = specs.stage("c.keep#1", sources=["b.double#1"], fires="closed", grains=["sample"], protocol="RANK_ZERO")
    return [
        specs.service("a", first, topology=Topology(1, 1, 4), **(a or {})),
        specs.service("b", second, **(b or {})),
        specs.service("c", last, worker="Keeper"),
    ]


class Chain:
    """The running pipeline: the test feeds its first service and reads what its last one reports."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.term = 0
        self.endpoints: dict[str, Endpoint] = {}
        self.settled: list[PromptSettled] = []

    async def start(self, services: Sequence[ServiceSpec]) -> None:
        """Start the services."""
        self.endpoints = {name: s.endpoint for name, s in (await self.runtime.start(list(services))).items()}

    async def restart(self, name: str) -> None:
        """Replace a service by a new incarnation."""
        self.endpoints[name] = (await self.runtime.restart([name], self.term))[name].endpoint

    async def begin_term(self, term: int) -> None:
        """Have all services begin a term."""
        self.term, self.settled = term, []
        for endpoint in self.endpoints.values():
            assert await ask(endpoint, BeginTerm(term)) == (Done(), [])

    def put(self, batch: Batch) -> ShardRef:
        """Put a batch into the test's own store."""
        return pack(self.runtime.store, batch, term=self.term)

    async def send(self, *parts: ShardRef, attempt: int = 0, to: str = A_EDGE, term: int | None = None) -> None:
        """Deliver shards as their sending service would, of the current term if none is given."""
        of_term = self.term if term is None else term
        delivery = Delivery(to, of_term, [part.shard for part in parts], attempt=attempt)
        await self.endpoints[to[0]].deliver(delivery, [part.payload for part in parts])

    async def redeliver(self, edge: str) -> None:
        """Ask the sender of an edge to deliver everything again that its outbox holds."""
        sender = {B_EDGE: "a", C_EDGE: "b"}[edge]
        assert await ask(self.endpoints[sender], Redeliver(edge)) == (Done(), [])

    async def end(self, *prompts: int) -> None:
        """Tell every service that these prompts have ended."""
        for endpoint in self.endpoints.values():
            await ask(endpoint, EndPrompts(list(prompts)))

    async def until_settled(self, rows: int) -> list[PromptSettled]:
        """Wait until `rows` rows have settled at the end of the pipeline, and return all that have."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while len(self.settled) < rows:
                    notices = await self.endpoints["c"].notices()
                    self.settled += [notice for notice in notices if isinstance(notice, PromptSettled)]
        except TimeoutError:
            pytest.fail(f"{len(self.settled)} of {rows} rows settled; {await self.state()}")
        return self.settled

    async def until(self, name: str, waits: str, depth: int) -> None:
        """Wait until a service's stage reports this wait and its mailbox holds `depth` rows."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    now = await self.statistics(name)
                    if now.waits.get(f"{name}.double#1", "") == waits and now.edges[0].depth == depth:
                        return
                    await asyncio.sleep(0.005)
        except TimeoutError:
            pytest.fail(f"{name} does not wait for {waits!r} with {depth} rows in its mailbox; {await self.state()}")

    async def until_waits(self, name: str, waits: str) -> None:
        """Wait until some stage of a service reports this wait."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while waits not in (await self.statistics(name)).waits.values():
                await asyncio.sleep(0.005)

    async def values(self, samples: Sequence[int]) -> dict[int, float]:
        """Sample id -> its value at the end of the pipeline."""
        reply, _ = await ask(self.endpoints["c"], CloseBatch(0, list(samples)))
        assert isinstance(reply, BatchClosed)
        return {int(sample): value for sample, value in reply.values.items()}

    async def statistics(self, name: str) -> ServiceStatistics:
        """A service's own statistics."""
        reply, _ = await ask(self.endpoints[name], GetStatistics())
        assert isinstance(reply, Statistics)
        return reply.statistics

    async def edge(self, edge: str) -> EdgeStatistics:
        """The consumer's statistics of one edge."""
        (found,) = [e for e in (await self.statistics(edge[0])).edges if e.edge == edge]
        return found

    async def state(self) -> str:
        """Depths and waits of every service, for the message of a timeout."""
        services = [await self.statistics(name) for name in self.endpoints]
        depths = [f"{e.edge}: {e.depth} of {e.rows} rows" for s in services for e in s.edges]
        return f"{'; '.join(depths)}; waits {[s.waits for s in services]}"


@asynccontextmanager
async def local_chain(a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> AsyncIterator[Chain]:
    """The pipeline on the local runtime; `a` and `b` as in `chain_specs`."""
    made = Chain(LocalRuntime())
    try:
        await made.start(chain_specs(a, b))
        yield made
    finally:
        await made.runtime.stop()
