"""The Ray actors of a service: its coordinator and its ranks. Their methods take and return bytes and payloads.

The rank that encodes a frame stores it once (ray_store.py). Messages carry a payload for it, and only the rank that
reads the frame maps its bytes. Each actor also listens on a socket (wire.py) for calls without object references;
ray_peers.py is the caller's side of both ways.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from asyncflow.services.channels.endpoint import Frame, Payload
from asyncflow.services.ranks.loaded_worker import LoadedWorker
from asyncflow.services.ranks.rank import Rank
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.ranks.worker_factory import build
from asyncflow.services.runtime.ray_peers import RayEndpoint, RayRanks
from asyncflow.services.runtime.ray_store import RayStore, ReplyStore
from asyncflow.services.runtime.wire import Server
from asyncflow.services.service import ModelService
from protocols.control.delivery import Delivery, RankCall
from protocols.control.requests import RankRequest, Request

if TYPE_CHECKING:
    from workers.parallel.process_group import Rendezvous

_deliveries, _requests = msgspec.msgpack.Decoder(Delivery), msgspec.msgpack.Decoder(Request)
_rank_calls, _rank_requests = msgspec.msgpack.Decoder(RankCall), msgspec.msgpack.Decoder(RankRequest)


class ServiceActor:
    """The Ray actor around a ModelService."""

    def __init__(self, spec: bytes, wire: str, ranks: Sequence[Any], rank_wires: Sequence[str]) -> None:
        """`wire`: the socket's name, "" for none; `ranks` listen under `rank_wires`."""
        self._spec = msgspec.msgpack.decode(spec, type=ServiceSpec)
        log_to(self._spec.log_path)
        name, collective = self._spec.name, self._spec.collective
        self._store = RayStore(self._spec.limits.inline_bytes, self._spec.limits.shared_bytes)
        several = RayRanks(name, ranks, rank_wires, self._store, rendezvous=collective) if ranks else None
        self._service = ModelService(self._spec, self._store, several)
        self._server = Server(wire, self._answer) if wire else None
        self._peers: dict[str, RayEndpoint] = {}

    async def start(self) -> tuple[str, int]:
        """Start the service. Returns the address and port of the metrics endpoint."""
        host = ray.util.get_node_ip_address() if self._spec.metrics_host == "node" else self._spec.metrics_host
        port = await self._service.start(host)
        if self._server is not None:
            await self._server.start()
        return host, port

    async def connect(self, actors: Mapping[str, Any], wires: Mapping[str, str]) -> None:
        """Set the other services' actors and socket names; called again when one was replaced."""
        known = {peer.wire: peer for peer in self._peers.values() if peer.wire}
        self._peers = {
            name: known.get(wires[name]) or RayEndpoint(name, actor, wires[name], self._store)
            for name, actor in actors.items()
        }
        self._service.connect({**self._peers, self._spec.name: self._service})

    async def call(self, what: str, body: bytes, payloads: list[Payload]) -> tuple[bytes, list[Payload]]:
        """Answer a call through Ray."""
        reply, answers = await self._answer(what, body, payloads)
        return reply, await self._store.by_reference(answers)

    async def collect(self, kept: int) -> list[Payload]:
        """See `wire.Server.collect`."""
        assert self._server is not None, "an actor that does not listen keeps no answers"
        return await self._store.by_reference(self._server.collect(kept))

    async def _answer(self, what: str, body: bytes, payloads: list[Payload]) -> tuple[bytes, list[Payload]]:
        match what:
            case "deliver":  # a mailbox keeps the payloads, while a request's are read at once
                payloads[:] = await self._store.admit(payloads)  # in place, or the caller's list would keep the frames
                await self._service.deliver(_deliveries.decode(body), payloads)
                return b"", []
            case "request":
                reply, answers = await self._service.request(_requests.decode(body), payloads)
                return msgspec.msgpack.encode(reply), answers
            case "notices":
                return msgspec.msgpack.encode(await self._service.notices()), []
        raise ValueError(f"{self._spec.name} has no call {what!r}")

    async def stop(self) -> None:
        await self._service.stop()
        if self._server is not None:
            await self._server.close()


class RankActor:
    """The Ray actor around one rank of a service with several. The rank computes in a thread, one call at a time."""

    def __init__(self, spec: bytes, wire: str, rank: int) -> None:
        """`wire`: the socket's name, "" for none."""
        self._spec = msgspec.msgpack.decode(spec, type=ServiceSpec)
        self._number = rank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{self._spec.name}-{rank}-compute")
        self._store = RayStore(self._spec.limits.inline_bytes, self._spec.limits.shared_bytes)
        self._server = Server(wire, self._answer) if wire else None
        self._rank: Rank | None = None
        self._hosted: Rendezvous | None = None
        if self._spec.log_path:
            path = Path(self._spec.log_path)
            log_to(str(path.with_name(f"{path.stem}-{rank}{path.suffix}")))

    async def create_store(self) -> str:
        """Create the rendezvous store of all ranks, which this process keeps open; returns its address."""
        from workers.parallel.process_group import create_store

        self._hosted, address = create_store(ray.util.get_node_ip_address())
        return address

    async def start(self, address: str) -> None:
        """Join the others at the rendezvous store's address ("" for independent ranks), load the model, then listen."""
        loaded = await asyncio.get_running_loop().run_in_executor(self._thread, self._build, address)
        self._rank = Rank(self._spec, loaded, self._store, self._thread, self._number)
        if self._server is not None:
            await self._server.start()

    async def call(self, what: str, body: bytes, payloads: list[Payload]) -> tuple[bytes, list[Payload]]:
        """Answer a call through Ray."""
        return await self._answer(what, body, payloads, ReplyStore(self._spec.limits.inline_bytes))

    async def call_large(
        self, what: str, body: bytes, payloads: list[Payload]
    ) -> tuple[tuple[bytes, list[Payload]], Frame | None]:
        """Like `call`, with a large frame as a second value: None stands for it among the payloads."""
        output = ReplyStore(self._spec.limits.inline_bytes, apart=True)
        return await self._answer(what, body, payloads, output), output.frame

    async def collect(self, kept: int) -> list[Payload]:
        """See `wire.Server.collect`."""
        assert self._server is not None, "an actor that does not listen keeps no answers"
        return await self._store.by_reference(self._server.collect(kept))

    async def stop(self) -> None:
        """Stop listening, and free the model if it was loaded."""
        if self._server is not None:
            await self._server.close()
        if self._rank is not None:
            await self._rank.close()
        self._thread.shutdown(wait=False)

    async def _answer(
        self, what: str, body: bytes, payloads: list[Payload], output: ReplyStore | None = None
    ) -> tuple[bytes, list[Payload]]:
        """Run the rank's part of a firing or of a request to all ranks."""
        assert self._rank is not None, f"rank {self._number} of {self._spec.name} is not started"
        match what:
            case "call":
                reply, answers = await self._rank.call(_rank_calls.decode(body), payloads, output)
            case "ask":
                reply, answers = await self._rank.ask(_rank_requests.decode(body), output)
            case _:
                raise ValueError(f"rank {self._number} of {self._spec.name} has no call {what!r}")
        return msgspec.msgpack.encode(reply), answers

    def _build(self, address: str) -> LoadedWorker:
        if not address:
            return build(self._spec, self._number)
        from workers.parallel.process_group import connect_store, join_world

        size = self._spec.topology.world_size
        return build(self._spec, self._number, join_world(self._hosted or connect_store(address), self._number, size))


def log_to(path: str) -> None:
    """Redirect this process's output to its log file."""
    if path:
        log = Path(path).open("a", buffering=1)  # noqa: SIM115 - open for as long as the process lives
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = log, log
