"""A simulated run as one state machine: pure, single-threaded, without a clock.

    world.actions()  what can happen next
    world.faults()   the faults that can happen next, while the run has any left
    world.apply(a)   let one of them happen

Admission, batches, joins, mailboxes, outboxes and leases are the real ones. A scheduler decides what happens next:
at random, by durations, or every order one after the other.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

from asyncflow.control.device_lease import Claim
from asyncflow.dataflow.graph import ADVANTAGE
from asyncflow.dataflow.graph import Stage as Call
from protocols.control.notices import Waiting
from protocols.data.ids import prompt_of
from tests.asyncflow.services.rows import remembered
from tests.asyncflow.simulation.configuration import GENERATOR, TRAINED, Config
from tests.asyncflow.simulation.controller import Controller
from tests.asyncflow.simulation.generation import Engine, GeneratingStage
from tests.asyncflow.simulation.network import Action, Delivery, Network
from tests.asyncflow.simulation.rows import Owner
from tests.asyncflow.simulation.rules import Rules
from tests.asyncflow.simulation.service import Service
from tests.asyncflow.simulation.stages import CallSite, ClosingStage, RowStage, TrainingStage
from tests.asyncflow.simulation.turns import OpenLease, Turns
from tests.asyncflow.simulation.watch import Deadlock, Watch

CHANCE = "chance"
THE_REAL_RULES = Rules()


class World:
    """One run, from the first admission to the last commit."""

    def __init__(self, config: Config, rules: Rules = THE_REAL_RULES) -> None:
        self.config, self.rules = config, rules
        self.watch = Watch(self)
        self.network = Network(self)
        self.hybrid = config.layout == "colocated"
        self.leases = rules.leases(config.pools)
        self.services = {name: Service(self, name, self.leases.get(name)) for name in [*config.pools, ADVANTAGE]}
        self.stages = {call.name: self._stage(call) for call in config.dataflow.stages}
        self.generating = [s for s in self.stages.values() if isinstance(s, GeneratingStage)]
        self.sinks = [s for s in self.stages.values() if isinstance(s, TrainingStage)]
        self.closing = next(s for s in self.stages.values() if isinstance(s, ClosingStage))
        self.engines = self._add_engines()
        self.inlets: dict[str, tuple[CallSite, int]] = {
            c.edge: (self.stages[c.destination], c.position) for c in config.dataflow.channels
        }
        self._sources = {c.edge: c.source for c in config.dataflow.channels}
        self.controller = Controller(self)
        self.faults_left = {name: getattr(config.faults, name) for name in config.faults.__struct_fields__}
        self.doomed: set[tuple[str, int]] = set()  # (stage or engine, row) that will fail
        self.fated: set[int] = set()  # prompts with a row that is doomed, or was
        self.victim = ""  # the only process that may die; "" for any that `mortal` lists
        self._generations: Counter[int] = Counter()
        self._parts = {p.name: p for s in self.services.values() for p in [s, *s.parts]} | {
            p.name: p for p in (self.network, self.controller, *self._turns())
        }

    # --- the state machine

    def actions(self) -> list[Action]:
        """The possible next events."""
        return [action for part in self._parts.values() for action in part.actions()]

    def apply(self, action: Action) -> None:
        """Apply an event. Raises Violation if it breaks a rule."""
        self.watch.count("actions")
        if action.who == CHANCE:
            self._go_wrong(action)
        else:
            self._parts[action.who].do(action)

    @property
    def finished(self) -> bool:
        """All steps are committed. Deliveries in flight may still arrive."""
        return self.controller.finished

    def check_end(self) -> None:
        """No event is possible any more. Raises Deadlock or Violation if the run is not finished properly."""
        if not self.finished:
            raise Deadlock(f"at version {self.controller.version}: {'; '.join(self.standing())}")
        self.watch.finished()

    # --- faults

    def faults(self) -> list[Action]:
        """The possible next faults; none once the run is finished."""
        left = self.faults_left
        if self.finished:
            return []
        found: list[Action] = []
        if left["failures"]:
            found += [Action(CHANCE, "fail", row) for row in self.rows_at_work()]
        if left["drops"]:
            found += [Action(CHANCE, "drop", prompt) for prompt in self.controller.droppable()]
        if left["duplicates"]:
            found += [Action(CHANCE, "duplicate", flight) for flight in self.network.flights]
        if left["losses"]:
            found += [Action(CHANCE, "lose", flight) for flight in self.network.flights]
        if left["restarts"]:
            found += [Action(CHANCE, "restart", name) for name in self.mortal()]
        return found

    def mortal(self) -> list[str]:
        """The processes that may die: services without trained state, and engines outside of the policy.

        The join's service may die except while a batch trains: some trainers may have had the batch already, so its
        loss would be a loss of trained state and roll the run back, which this world does not simulate.
        """
        services = [s for s in self.services if s not in (*TRAINED, ADVANTAGE)]
        services += [ADVANTAGE] if self.controller.training is None else []
        found = services + [e.name for e in self.engines if not self.hybrid]
        return found if not self.victim else [name for name in found if name == self.victim]

    def _go_wrong(self, action: Action) -> None:
        match action.verb:
            case "fail":
                where, sample = action.item
                self._fail(where, sample)
                self.faults_left["failures"] -= 1
            case "drop":
                self.controller.drop(action.item)
                self.faults_left["drops"] -= 1
            case "duplicate":
                self.network.fly(self.network.flights[action.item])
                self.faults_left["duplicates"] -= 1
            case "lose":
                self.network.lose(action.item)
                self.faults_left["losses"] -= 1
            case "restart":
                self._restart(action.item)
                self.faults_left["restarts"] -= 1
        self.watch.count(action.verb)

    def rows_at_work(self) -> Iterator[tuple[str, int]]:
        for stage in self.stages.values():
            if isinstance(stage, RowStage) and stage.phase == "working":
                yield from ((stage.name, s) for s, _ in stage.taken if s not in stage.failing)
        for engine in self.engines:
            yield from ((engine.name, s) for s, running in engine.running.items() if not running.failing)

    def _fail(self, where: str, sample: int) -> None:
        stage = self.stages.get(where)
        if isinstance(stage, RowStage):
            stage.failing.add(sample)
        else:
            next(e for e in self.engines if e.name == where).running[sample].failing = True

    def _restart(self, name: str) -> None:
        """A process dies; its successor starts without state and receives what it needs."""
        for engine in self.engines:
            if engine.name == name:
                engine.die()
                engine.load(self.controller.newest_weights)
                return
        service = self.services[name]
        own = {s.name for s in self.stages.values() if s.service is service}
        edges = {edge for edge, (stage, _) in self.inlets.items() if stage.name in own}
        service.restart()
        self.network.forget(edges, own)
        if self.rules.tells_ended:
            service.end([p for p, fate in self.controller.fates.items() if fate != "live"])
        if name == ADVANTAGE:
            self.controller.join_died()
        if name == GENERATOR:
            self.controller.regenerate()
            for engine in self.engines:
                engine.load(self.controller.newest_weights)
        for edge in edges:
            self.network.redeliver(edge)

    # --- calls of the parts

    def row_stage(self, name: str) -> RowStage:
        """The row stage of that name."""
        stage = self.stages[name]
        assert isinstance(stage, RowStage)
        return stage

    def readable(self, owner: Owner) -> bool:
        """Whether the process that holds a row's bytes is alive."""
        name, incarnation = owner
        return name == self.controller.name or self.services[name].incarnation == incarnation

    def kept(self, edge: str) -> list[Delivery]:
        """The rows that the sender of an edge would send again."""
        source = self._sources[edge]
        if source not in self.stages:
            return self.controller.redelivery(edge)
        return self.stages[source].service.outbox.kept(edge)

    def grant(self, claim: Claim | None) -> None:
        """Act on the grant of a lease."""
        if claim is not None:
            self.watch.granted(self.leases[claim.service], claim.ticket)
            self.services[claim.service].granted(claim.stage)

    def next_generation(self, sample: int) -> int:
        """The number of a new generation of a sample, from 1."""
        self._generations[sample] += 1
        return self._generations[sample]

    def is_doomed(self, where: str, sample: int) -> bool:
        """Whether a row that begins now will fail. True once per doomed row."""
        if (where, sample) not in self.doomed:
            return False
        self.doomed.discard((where, sample))
        self.watch.count("fail")
        return True

    def turns(self, sample: int) -> int:
        """The number of engine steps that a row takes: usually few, sometimes many."""
        most, stragglers = self.config.turns, self.config.stragglers
        if stragglers:
            return most if prompt_of(sample) in stragglers else 1
        luck = hashlib.blake2b(f"{sample}/{self._generations[sample]}".encode(), digest_size=2).digest()
        return most if luck[0] < 26 else 1 + luck[1] % max(1, most // 3)

    # --- reports

    def leaks(self) -> Iterator[str]:
        """What is still held in memory, by place."""
        held = {f"outbox of {s.name}": len(s.outbox) for s in self.services.values()}
        held["outbox of the controller"] = len(self.controller.outbox)
        held["flights"] = len(self.network.flights)
        for stage in self.stages.values():
            if isinstance(stage, RowStage | GeneratingStage):
                held[stage.name] = len(stage.table) + remembered(stage.table)
        held[self.closing.name] = self.closing.join.depth
        return (f"{number} in {place}" for place, number in held.items() if number)

    def waits(self) -> Iterator[Waiting]:
        """The waits that the stages report: for room at another stage, or for devices."""
        for sender, waits in self.network.awaited.items():
            for d in waits.values():
                yield Waiting(sender, "credit", self.inlets[d.edge][0].name)
        for service, lease in self.leases.items():
            for claim in lease.waiting:
                if claim.service == service:
                    yield Waiting(claim.stage, "the lease", lease.pool)

    def standing(self) -> Iterator[str]:
        """The state of every part, for the message of a deadlock."""
        for stage in self.stages.values():
            if isinstance(stage, RowStage):
                yield f"{stage.name} {stage.phase}, {len(stage.table)} rows, {stage.table.complete} settled"
            elif isinstance(stage, GeneratingStage):
                yield f"{stage.name} {len(stage.table)} waiting, {len(stage.running)} running, {len(stage.out)} unsent"
        for engine in self.engines:
            yield f"{engine.name} {engine.phase} at version {engine.version}, {len(engine.running)} rows"
        admission = self.controller.admission
        yield f"{admission.live} live, {admission.incomplete} incomplete, {self.controller.inflight.ready} ready"
        yield f"{self.closing.join.depth} rows at the join, {len(self.network.flights)} deliveries in flight"
        for pool, lease in {lease.pool: lease for lease in self.leases.values()}.items():
            if lease.holder is not None:
                yield f"{pool} held by {lease.holder.stage}, {len(lease.waiting)} wait"

    # --- assembly

    def _stage(self, call: Call) -> CallSite:
        name = GENERATOR if call.generates and not self.hybrid else call.service
        service = self.services[name]
        if call.generates:
            stage: CallSite = GeneratingStage(self, service, call)
        elif call.closes:
            stage = ClosingStage(self, service, call)
        elif call.is_sink:
            stage = TrainingStage(self, service, call)
        else:
            stage = RowStage(self, service, call)
        service.parts.append(stage)
        return stage

    def _turns(self) -> list[Turns]:
        pools = {lease.pool: lease for lease in self.leases.values()}
        return [Turns(self, lease) for lease in pools.values() if isinstance(lease, OpenLease)]

    def _add_engines(self) -> list[Engine]:
        service = self.services["policy" if self.hybrid else GENERATOR]
        engines = [Engine(self, service, n, hybrid=self.hybrid) for n in range(self.config.replicas)]
        service.parts += engines
        return engines
