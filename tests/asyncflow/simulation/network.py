"""The simulated network: a delivery may arrive at any time, in any order, twice or never."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from protocols.stage import Failure
from tests.asyncflow.simulation.rows import Owner, Request, Row

if TYPE_CHECKING:
    from tests.asyncflow.simulation.world import World


class Action(NamedTuple):
    """A possible next event: which part does what, and to which row, prompt or delivery."""

    who: str
    verb: str
    item: Any = 0

    def __str__(self) -> str:
        return f"{self.who} {self.verb} {self.item}"


class Delivery(NamedTuple):
    """Rows of one attempt for one edge. Copies of a delivery have the same number."""

    number: int
    edge: str
    sender: str
    owner: Owner
    attempt: int
    rows: tuple[tuple[int, Row | Request | Failure], ...]
    step: int = -1

    @property
    def samples(self) -> list[int]:
        return [sample for sample, _ in self.rows]


class Network:
    """The deliveries in transit, and the senders that wait for room at the receiver."""

    name = "network"

    def __init__(self, world: World) -> None:
        self._world = world
        self.flights: dict[int, Delivery] = {}
        self.awaited: defaultdict[str, dict[int, Delivery]] = defaultdict(dict)  # by sending stage
        self.to_resend: dict[str, None] = {}  # edges that lost something
        self._number = 0

    def actions(self) -> Iterator[Action]:
        for flight, delivery in self.flights.items():
            stage, position = self._world.inlets[delivery.edge]
            if stage.has_room(position, delivery):
                yield Action("network", "deliver", flight)
        for edge in self.to_resend:
            yield Action("network", "resend", edge)

    def do(self, action: Action) -> None:
        if action.verb == "resend":
            del self.to_resend[action.item]
            self.redeliver(action.item)
            return
        delivery = self.flights.pop(action.item)
        stage, position = self._world.inlets[delivery.edge]
        stage.accept(position, delivery)
        waits = self.awaited.get(delivery.sender)
        if waits and waits.pop(delivery.number, None) is not None and not waits:
            self._world.stages[delivery.sender].sent()

    def send(self, delivery: Delivery) -> None:
        """Send a delivery; the sender waits until the receiver has room."""
        self.awaited[delivery.sender][delivery.number] = delivery
        self.fly(delivery)

    def fly(self, delivery: Delivery) -> None:
        """Put a copy in transit."""
        self.flights[self.number()] = delivery

    def number(self) -> int:
        """A number that is used once in this world."""
        self._number += 1
        return self._number

    def waits(self, sender: str) -> bool:
        """Whether a stage waits for credit."""
        return bool(self.awaited.get(sender))

    def redeliver(self, edge: str) -> None:
        """Send again what the sender's outbox holds for an edge and what it waits for, unless it is in flight."""
        flying = {d.number for d in self.flights.values() if d.edge == edge}
        waited = [d for waits in self.awaited.values() for d in waits.values() if d.edge == edge]
        kept = self._world.kept(edge)
        for delivery in {d.number: d for d in kept + waited}.values():
            if delivery.number not in flying:
                self.fly(delivery)

    def lose(self, flight: int) -> None:
        """A delivery is lost; its sender will send it again."""
        self.to_resend[self.flights.pop(flight).edge] = None

    def forget(self, edges: set[str], senders: set[str]) -> None:
        """A process died: calls to it fail, and its own waits end."""
        self.flights = {n: d for n, d in self.flights.items() if d.edge not in edges}
        for sender in senders:
            self.awaited.pop(sender, None)
