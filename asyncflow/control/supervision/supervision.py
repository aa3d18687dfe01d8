"""What follows from a service's death: who is replaced and has its rows sent again, when the run ends instead. Pure.

A service that only answers has no state that the others don't have: what it was working on is still with those who
sent it. A generator is given its weights and its prompts anew, and what it had drawn is drawn again (`handing_out`).
One that trains, or that joins what a batch is made of, takes the run with it; the run is resumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from asyncflow.dataflow.graph import SOURCE, Dataflow


class Resend(msgspec.Struct, frozen=True):
    """A sender that has to send again what an edge may have lost."""

    service: str
    edge: str


class Replacement(msgspec.Struct, frozen=True):
    """A service to be started anew."""

    service: str
    number: int  # of its replacements, 1 for the first
    stages: list[str]  # which waited in it
    resend: list[Resend]


class Supervisor:
    """Counts deaths. `hosts` says which service answers a stage."""

    def __init__(self, dataflow: Dataflow, hosts: Mapping[str, str], replaceable: Iterable[str], limit: int) -> None:
        self._dataflow, self._hosts = dataflow, hosts
        self._replaceable = frozenset(replaceable)
        self._limit = limit
        self._deaths: Counter[str] = Counter()

    def may_die(self, service: str) -> bool:
        """Whether the run goes on without this service for a while."""
        return service in self._replaceable

    def deaths(self, service: str) -> int:
        """How often it has died."""
        return self._deaths[service]

    def replace(self, service: str) -> Replacement | None:
        """What to do about a death; None where the run can't go on."""
        self._deaths[service] += 1
        if service not in self._replaceable or self._deaths[service] > self._limit:
            return None
        stages = [stage for stage, host in self._hosts.items() if host == service]
        resend = [again for stage in stages for again in self.resend_to(stage)]
        return Replacement(service, self._deaths[service], stages, resend)

    def resend_to(self, stage: str) -> list[Resend]:
        """Who sends to a stage: a row of a join that is lost on one edge is needed again on all."""
        inputs = self._dataflow.inputs_of(stage)
        return [Resend(self._hosts[channel.source], channel.edge) for channel in inputs if channel.source != SOURCE]
