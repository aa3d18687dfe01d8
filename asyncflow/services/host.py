"""What a service's stages share: one compute thread, the pool's lease, the way out, and the report to the controller.

Waiting for credit suspends only the sending stage: no lease, no compute thread and no engine slot is held
while `send` waits. The lease is asked for with all inputs in hand and returned before anything is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from asyncflow.observe.exporter import Exporter
from asyncflow.services.endpoint import Endpoint, Payload, Store
from asyncflow.services.spec import ServiceSpec, StageSpec
from protocols import codec
from protocols.columns import Batch
from protocols.control import Busy, Delivery, LeaseAsked, LeaseReturned, Notice, Span, Waiting
from protocols.stage import Failure

T = TypeVar("T")

MOST_NOTICES = 10_000  # a controller that reads nothing for this long has gone


class Host:
    """The inside of a service, as its stages see it."""

    def __init__(self, spec: ServiceSpec, store: Store, exporter: Exporter) -> None:
        self.spec = spec
        self.store = store
        self.exporter = exporter
        self.peers: Mapping[str, Endpoint] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{spec.name}-compute")
        self._notices: deque[Notice] = deque()
        self._noticed = asyncio.Event()
        self._tickets = itertools.count()
        self._grants: dict[int, asyncio.Future[None]] = {}

    async def compute(
        self, activity: str, function: Callable[..., T], *arguments: Any, rows: int = 0, step: int = -1
    ) -> T:
        """Run blocking work in the service's one compute thread and account for its time."""
        delay = self.spec.delay_seconds.get(activity.split("#", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1], 0.0)
        start = time.time()
        if delay:
            await asyncio.sleep(delay)
        result = await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments))
        end = time.time()
        self.exporter.inc("busy_seconds_total", end - start, activity=activity)
        self.notify(Busy([Span(self.spec.name, activity, start, end, rows, step)]))
        return result

    @asynccontextmanager
    async def lease(self, stage: str) -> AsyncIterator[None]:
        """The pool's devices, in calling order; free of charge where nobody shares them."""
        if not self.spec.leased:
            yield
            return
        ticket = next(self._tickets)
        granted = self._grants[ticket] = asyncio.get_running_loop().create_future()
        self.notify(LeaseAsked(ticket, stage))
        try:
            await granted
            yield
        finally:
            del self._grants[ticket]
            self.notify(LeaseReturned(ticket))

    def grant(self, ticket: int) -> None:
        """The controller gives the lease that was asked for; a ticket no longer waited for returns by itself."""
        future = self._grants.get(ticket)
        if future is not None and not future.done():
            future.set_result(None)

    async def send(self, stage: StageSpec, batch: Batch | None, failures: list[Failure], step: int = -1) -> None:
        """Hand rows to every consumer of a stage; returns when all had room. The frame is written once."""
        rows = len(batch) if batch is not None else 0
        if not rows and not failures:
            return
        payload: Payload | None = None
        if batch is not None and rows:
            payload = self.store.put(codec.encode(batch, term=self.spec.term))
        start = time.time()
        self.notify(Waiting(stage.name, "credit", ", ".join(t.edge for t in stage.outputs), start))
        async with asyncio.TaskGroup() as group:
            for target in stage.outputs:
                delivery = Delivery(target.edge, self.spec.term, rows, failures, step)
                group.create_task(
                    self.peers[target.service].deliver(delivery, payload), name=f"{stage.name} -> {target.edge}"
                )
        self.notify(Waiting(stage.name))
        self.exporter.observe("channel_wait_seconds", time.time() - start, channel=stage.name, side="send")

    def notify(self, notice: Notice) -> None:
        """Queue something for the controller."""
        if len(self._notices) >= MOST_NOTICES:
            raise RuntimeError(f"service {self.spec.name}: {MOST_NOTICES} notices that no controller has read")
        self._notices.append(notice)
        self._noticed.set()

    async def notices(self) -> list[Notice]:
        """All queued notices; waits until there is one."""
        await self._noticed.wait()
        self._noticed.clear()
        taken = list(self._notices)
        self._notices.clear()
        return taken

    async def finish(self, last: Callable[[], None]) -> None:
        """Do one last thing in the compute thread, behind its current call, which may use what `last` frees."""
        await asyncio.get_running_loop().run_in_executor(self._thread, last)

    def close(self) -> None:
        """End the compute thread when its current call is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)
