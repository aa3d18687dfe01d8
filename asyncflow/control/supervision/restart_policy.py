"""What follows from a service's death: it is replaced and its rows are sent again, or the run ends. Pure.

A service that only computes rows has no state of its own: its senders still hold the rows that it was working on. A
generator gets its weights and prompts again and regenerates its rows (`generating_service`). A service that trains, or
that joins the rows of a batch, takes the run with it; the run is then resumed from a checkpoint.
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


class RestartPolicy:
    """Counts deaths: each service may die `limit` times within any `window_seconds`."""

    def __init__(
        self,
        dataflow: Dataflow,
        services: Mapping[str, str],
        replaceable: Iterable[str],
        limit: int,
        window_seconds: float,
    ) -> None:
        """`services` maps each stage to the service that runs it."""
        self._dataflow, self._services = dataflow, services
        self._replaceable = frozenset(replaceable)
        self._limit, self._window = limit, window_seconds
        self.deaths: Counter[str] = Counter()  # by service, in the whole run
        self._recent: defaultdict[str, deque[float]] = defaultdict(deque)  # times of the deaths in the window

    def may_die(self, service: str) -> bool:
        """Whether the run can go on without this service until its successor has started."""
        return service in self._replaceable

    def replace(self, service: str, now: float) -> bool:
        """Count a death at `now`, in seconds of any clock. Whether to start a successor; False: `refusal` says why."""
        self.deaths[service] += 1
        recent = self._recent[service]
        recent.append(now)
        while recent[0] <= now - self._window:
            recent.popleft()
        return service in self._replaceable and len(recent) <= self._limit

    def refusal(self, service: str) -> str:
        """Why a service that died gets no successor."""
        if service not in self._replaceable:
            return f"{service} died, and the run can't go on without what it has trained or joined"
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
