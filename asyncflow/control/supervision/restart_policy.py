"""What follows from a service's death: it is replaced, all that is trained rolls back, or the run ends. Pure.

A service that only computes rows has no state of its own: its senders still hold the rows that it was working on, and
send them again. A generator gets its weights and prompts again and regenerates its rows (`generating_service`). What a
service with trained state has learned since the last checkpoint dies with it, so all services with state go back to
that checkpoint in a new term.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping

import msgspec

from asyncflow.dataflow.graph import SOURCE, Dataflow


class Resend(msgspec.Struct, frozen=True):
    """A sender that has to send the rows of an edge again."""

    service: str
    edge: str


class RollBack(msgspec.Struct, frozen=True):
    """The run goes on from its last checkpoint."""

    after_seconds: float  # what failed again and again may need time, as a node that restarts


class GiveUp(msgspec.Struct, frozen=True):
    """The run ends."""

    why: str


LONGEST_BACK_OFF_SECONDS = 30.0


class RestartPolicy:
    """Counts deaths: each service may die `limit` times within any `window_seconds`.

    At most as many rollbacks may follow one another without a step beyond the furthest one reached: what one batch
    causes would happen again for ever.
    """

    def __init__(
        self,
        dataflow: Dataflow,
        services: Mapping[str, str],
        replaceable: Iterable[str],
        stateful: Iterable[str],
        limit: int,
        window_seconds: float,
    ) -> None:
        """`services` maps each stage to the service that runs it; `stateful`: those whose state is in checkpoints."""
        self._dataflow, self._services = dataflow, services
        self._replaceable, self._stateful = frozenset(replaceable), frozenset(stateful)
        self._reached = -1  # the most steps that were committed before a rollback
        self._fruitless = 0  # rollbacks since then
        self._limit, self._window = limit, window_seconds
        self.deaths: Counter[str] = Counter()  # by service, in the whole run
        self._recent: defaultdict[str, deque[float]] = defaultdict(deque)  # times of the deaths in the window

    def may_die(self, service: str) -> bool:
        """Whether the run can go on without this service until its successor has started."""
        return service in self._replaceable

    def replace(self, service: str, now: float) -> bool:
        """Count a death at `now`, in seconds of any clock. Whether to start a successor; False: `refusal` says why."""
        return self._count(service, now) and service in self._replaceable

    def has_state(self, service: str) -> bool:
        """Whether a death of this service is followed by a rollback of all services with state."""
        return service in self._stateful

    def roll_back(self, dead: Iterable[str], committed: int, now: float) -> RollBack | GiveUp:
        """Services with state died at `now`, or could not be started again, when `committed` steps were made."""
        too_often = [service for service in sorted(dead) if not self._count(service, now)]
        if committed > self._reached:
            self._reached, self._fruitless = committed, 0
        else:
            self._fruitless += 1
        if too_often:
            return GiveUp(self.refusal(too_often[0]))
        if self._fruitless > self._limit:
            return GiveUp(
                f"{self._fruitless} rollbacks from step {self._reached} made no step beyond it, more than "
                f"failures.restarts = {self._limit} allows"
            )
        return RollBack(min(2.0 ** (self._fruitless - 1), LONGEST_BACK_OFF_SECONDS) if self._fruitless else 0.0)

    def _count(self, service: str, now: float) -> bool:
        """Count a death. Whether the service may be started again."""
        self.deaths[service] += 1
        recent = self._recent[service]
        recent.append(now)
        while recent[0] <= now - self._window:
            recent.popleft()
        return len(recent) <= self._limit

    def refusal(self, service: str) -> str:
        """Why a service that died gets no successor."""
        if service not in self._replaceable | self._stateful:
            return f"{service} died, and the run can't go on without what it has joined"
        return (
            f"{service} died {len(self._recent[service])} times within {self._window:g} s, more than "
            f"failures.restarts = {self._limit} allows"
        )

    def stages_of(self, service: str) -> list[str]:
        """The stages that a service runs."""
        return [stage for stage, running in self._services.items() if running == service]

    def resend_to(self, stage: str) -> list[Resend]:
        """The senders of a stage. A row that a join lost on one edge is needed again on all of its edges."""
        inputs = self._dataflow.inputs_of(stage)
        return [Resend(self._services[channel.source], channel.edge) for channel in inputs if channel.source != SOURCE]
