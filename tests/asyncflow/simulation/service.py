"""A simulated service: its outbox, its one compute thread, and its claims on the devices of its pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from asyncflow.control.device_lease import Claim, PoolLease
from tests.asyncflow.simulation.network import Action
from tests.asyncflow.simulation.rows import Owner

if TYPE_CHECKING:
    from tests.asyncflow.simulation.world import World


class Part(Protocol):
    """A stage or an engine of a service."""

    name: str

    def actions(self) -> Iterator[Action]:
        """What it can do now."""
        ...

    def do(self, action: Action) -> None:
        """Do one of them."""
        ...

    def begin(self) -> None:
        """The devices that it claimed are granted."""
        ...

    def end(self, prompts: list[int]) -> None:
        """These prompts are finished."""
        ...

    def restart(self) -> None:
        """Its process died: its memory is lost."""
        ...


class Service:
    """One process."""

    def __init__(self, world: World, name: str, lease: PoolLease | None) -> None:
        self.world, self.name, self.lease = world, name, lease
        self.incarnation = 0
        self.weights = 0  # number of its optimizer steps
        self.outbox = world.rules.outbox()
        self.parts: list[Part] = []
        self.thread: Part | None = None
        self.queue: deque[Part] = deque()  # for the thread
        self.claims: dict[str, int] = {}  # part -> ticket, waiting or granted
        self.to_end: deque[list[int]] = deque()  # unread notices of finished prompts

    @property
    def owner(self) -> Owner:
        """The owner of the rows that it computes now."""
        return self.name, self.incarnation

    @property
    def leased(self) -> bool:
        return self.lease is not None

    def holds_lease(self, part: Part) -> bool:
        """Whether a part holds the devices."""
        holder = self.lease.holder if self.lease is not None else None
        return holder is not None and (holder.service, holder.ticket) == (self.name, self.claims.get(part.name))

    def actions(self) -> Iterator[Action]:
        if self.to_end:
            yield Action(self.name, "end")

    def do(self, action: Action) -> None:
        """Receive the oldest unread notice of finished prompts."""
        self.end(self.to_end.popleft())

    @property
    def unread_ended(self) -> set[int]:
        """Finished prompts of which it has received no notice yet."""
        return {prompt for prompts in self.to_end for prompt in prompts}

    def end(self, prompts: list[int]) -> None:
        """Drop everything about these prompts."""
        self.outbox.end(prompts)
        for part in self.parts:
            part.end(prompts)

    # --- devices: first the lease, then the thread, both in calling order

    def ask(self, part: Part) -> None:
        """A part has all its inputs and claims the devices; `begin` is called at the grant."""
        if self.lease is None:
            self._enter(part)
            return
        ticket = self.claims[part.name] = self.world.network.number()
        self.world.watch.asked(self.lease, ticket)
        self.world.grant(self.lease.ask(Claim(self.name, ticket, part.name)))

    def granted(self, name: str) -> None:
        """The pool's devices are granted to a part."""
        self._enter(next(p for p in self.parts if p.name == name))

    def leave_thread(self, part: Part) -> None:
        """A part has finished computing; the next one in the queue begins."""
        if self.thread is part:
            self.thread = None
            if self.queue:
                self._enter(self.queue.popleft())

    def leave_lease(self, part: Part) -> None:
        """Give a part's devices back, if it holds any."""
        if self.lease is not None and part.name in self.claims:
            self.world.grant(self.lease.give_back(self.name, self.claims.pop(part.name)))

    def leave(self, part: Part) -> None:
        """Give a part's thread and devices back."""
        self.leave_thread(part)
        self.leave_lease(part)

    def _enter(self, part: Part) -> None:
        if self.thread is None:
            self.thread = part
            part.begin()
        else:
            self.queue.append(part)

    def restart(self) -> None:
        """Die and start again with empty memory."""
        self.incarnation += 1
        self.outbox = self.world.rules.outbox()
        self.thread, self.queue, self.to_end = None, deque(), deque()
        for part in self.parts:
            part.restart()
        self.claims = {}
        if self.lease is not None:
            self.world.grant(self.lease.forget(self.name))
