"""What follows from a service's death: it is replaced and its rows are sent again, or the run ends. Pure.

A service that only computes rows has no state of its own: its senders still hold the rows that it was working on. A
generator gets its weights and prompts again and regenerates its rows (`generating_service`). A service that trains, or
that joins the rows of a batch, takes the run with it; the run is then resumed from a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from asyncflow.dataflow.graph import SOURCE, Dataflow


class Resend(msgspec.Struct, frozen=True):
    """A sender that has to send the rows of an edge again."""

    service: str
    edge: str


class RestartPolicy:
    """Counts deaths. `services` maps each stage to the service that runs it."""

    def __init__(self, dataflow: Dataflow, services: Mapping[str, str], replaceable: Iterable[str], limit: int) -> None:
        self._dataflow, self._services = dataflow, services
        self._replaceable = frozenset(replaceable)
        self._limit = limit
        self.deaths: Counter[str] = Counter()  # by service

    def may_die(self, service: str) -> bool:
        """Whether the run can go on without this service until its successor has started."""
        return service in self._replaceable

    def replace(self, service: str) -> bool:
        """Count a death. Whether to start a successor; False if the run can't go on."""
        self.deaths[service] += 1
        return service in self._replaceable and self.deaths[service] <= self._limit

    def stages_of(self, service: str) -> list[str]:
        """The stages that a service runs."""
        return [stage for stage, running in self._services.items() if running == service]

    def resend_to(self, stage: str) -> list[Resend]:
        """The senders of a stage. A row that a join lost on one edge is needed again on all of its edges."""
        inputs = self._dataflow.inputs_of(stage)
        return [Resend(self._services[channel.source], channel.edge) for channel in inputs if channel.source != SOURCE]
