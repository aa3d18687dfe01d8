"""Simulated generation: stages hold requests and generated rows; each engine has a version of the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import msgspec

from asyncflow.dataflow.graph import Stage as Call
from protocols.data.ids import prompt_of
from protocols.stage import Failure
from tests.asyncflow.simulation.network import Action, Delivery
from tests.asyncflow.simulation.rows import Request, Row
from tests.asyncflow.simulation.service import Service
from tests.asyncflow.simulation.stages import CallSite, Given

if TYPE_CHECKING:
    from tests.asyncflow.simulation.world import World


class GeneratingStage(CallSite):
    """The stage `generate`: requests in, generated rows out, at the pace of the slowest consumer."""

    def __init__(self, world: World, service: Service, call: Call) -> None:
        super().__init__(world, service, call)
        self.restart()

    def restart(self) -> None:
        self.table = self.world.rules.row_table(1)
        self.running: set[int] = set()
        self.out: list[tuple[int, int, Given]] = []  # sample, attempt, row

    def has_room(self, position: int, delivery: Delivery) -> bool:
        return True  # bounded by admission

    def accept(self, position: int, delivery: Delivery) -> None:
        self.table.arrive(position, delivery.rows, delivery.attempt)
        self._check_bound()

    def actions(self) -> Iterator[Action]:
        if self.out and not self.world.network.waits(self.name):
            yield Action(self.name, "send")

    def do(self, action: Action) -> None:
        gathered, self.out = self.out, []
        for attempt in dict.fromkeys(attempt for _, attempt, _ in gathered):
            self.send([(s, row) for s, a, row in gathered if a == attempt], attempt)

    def sent(self) -> None:
        for engine in self.world.engines:
            engine.rest()

    def end(self, prompts: list[int]) -> None:
        self.table.end(prompts)

    def next_request(self, version: int) -> int | None:
        """The oldest request that weights of a version may serve."""
        check = self.world.rules.min_version == "before the slot"
        for sample in self.table.next_complete(len(self.table)):
            (request,) = self.table.column(0, [sample])
            if not check or request.min_version <= version:
                return sample
        return None

    def _check_bound(self) -> None:
        config, admission = self.world.config, self.world.controller.admission
        rows = len(self.table) + len(self.running) + len(self.out)
        prompts = admission.window
        if self.service.incarnation:
            # A successor also regenerates rows of settled prompts, and of ended prompts whose notice is unread.
            ended = {
                prompt_of(s) for s in [*self.running, *(s for s, _, _ in self.out)]
            } - self.world.controller.min_versions.keys()
            prompts = config.most_live + len(ended | self.service.unread_ended)
        self.world.watch.bound("generating", self.name, rows, prompts * (1 if self.call.greedy else config.samples))

    def start(self, sample: int) -> Running:
        """Move a request to a slot of an engine."""
        joined = self.table.take([sample])
        self.running.add(sample)
        return Running(self, joined.inputs[0][0], joined.attempt, self.world.turns(sample))

    def finish(self, sample: int, running: Running) -> None:
        """A row is complete or has failed."""
        self.running.discard(sample)
        row: Given = Failure(sample, "failed")
        if not running.failing:
            generation = self.world.next_generation(sample)
            self.world.watch.seeded(sample, self.world.rules.seed(sample, generation))
            row = Row(generation, running.oldest, -1, self.service.owner)
        self.out.append((sample, running.attempt, row))

    def put_back(self, sample: int, running: Running) -> None:
        """The engine died. No part of the row has left, so it is generated under the same attempt."""
        self.running.discard(sample)
        self.table.take_back([sample])
        self.table.arrive(0, [(sample, running.request)], running.attempt)


class Running(msgspec.Struct):
    """A row in a slot of an engine."""

    stage: GeneratingStage
    request: Request
    attempt: int
    turns: int  # remaining engine steps
    oldest: int = 1 << 30
    failing: bool = False


class Engine:
    """One replica: its slots and the version of its weights. On shared devices it generates one firing per grant."""

    def __init__(self, world: World, service: Service, number: int, *, hybrid: bool) -> None:
        self.world, self.service, self.name = world, service, f"{service.name}/{number}"
        self.hybrid = hybrid  # it generates with the weights that its service trains
        self.restart()
        self.own_version = 0

    def restart(self) -> None:
        self.own_version = -1  # it serves nothing until its first load is complete
        self.loads: deque[int] = deque()
        self.running: dict[int, Running] = {}
        self.phase: Literal["idle", "asking", "generating", "sending"] = "idle"

    @property
    def version(self) -> int:
        return self.service.weights if self.hybrid else self.own_version

    def die(self) -> None:
        """Only the replica dies; its service gives its rows to the next engine that generates."""
        for sample, running in self.running.items():
            running.stage.put_back(sample, running)
        self.restart()
        self.service.leave(self)

    def load(self, version: int) -> None:
        """Receive newer weights, to be loaded later."""
        self.loads.append(version)

    def actions(self) -> Iterator[Action]:
        if self.service.leased and self.phase == "idle":
            if self._may_load() or self._requests():
                yield Action(self.name, "ask")
        elif not self.service.leased or self.phase == "generating":
            yield from self._turns()

    def _turns(self) -> Iterator[Action]:
        if self._may_load():
            for load in range(len(self.loads) if self.world.rules.loads == "in any order" else 1):
                yield Action(self.name, "load", load)
        if not self.service.leased and len(self.running) < self.world.config.slots:
            for sample in self._requests():
                yield Action(self.name, "start", sample)
        for sample, running in self.running.items():
            if self.version >= running.request.min_version or self.world.rules.min_version == "nowhere":
                yield Action(self.name, "decode", sample)

    def do(self, action: Action) -> None:
        match action.verb:
            case "ask":
                self.phase = "asking"
                self.service.ask(self)
                return
            case "load":
                version = self.loads[action.item]
                del self.loads[action.item]
                self.world.watch.loaded(self.name, self.own_version, version)
                self.own_version = version
            case "start":
                self._start(action.item)
            case "decode":
                self._decode(action.item)
        self.rest()

    def begin(self) -> None:
        self.phase = "generating"
        while len(self.running) < self.world.config.slots and (requests := self._requests()):
            self._start(requests[0])
        self.rest()

    def end(self, prompts: list[int]) -> None:
        """Running rows are generated to their end; their results are refused."""

    def rest(self) -> None:
        """Give the devices back if there is nothing to generate or load."""
        if not self.service.leased or self.phase not in ("generating", "sending"):
            return
        if self.running or self._may_load():
            return
        kept = self.world.rules.kept_while_sending
        if kept != "nothing" and any(s.out or self.world.network.waits(s.name) for s in self.world.generating):
            self.phase = "sending"
            if kept == "lease":
                self.service.leave_thread(self)
            else:
                self.service.leave_lease(self)
            return
        self.phase = "idle"
        self.service.leave(self)

    def _may_load(self) -> bool:
        return bool(self.loads) and not (self.running and self.world.rules.loads == "when idle")

    def _requests(self) -> list[int]:
        """The next request of each generating stage."""
        if self.version < 0:
            return []
        return [s for stage in self.world.generating if (s := stage.next_request(self.version)) is not None]

    def _start(self, sample: int) -> None:
        stage = next(s for s in self.world.generating if s.table.is_complete(sample))
        running = self.running[sample] = stage.start(sample)
        running.failing = self.world.is_doomed(self.name, sample)

    def _decode(self, sample: int) -> None:
        running = self.running[sample]
        running.oldest = min(running.oldest, self.version)
        running.turns -= 1
        if running.turns <= 0 or running.failing:
            del self.running[sample]
            running.stage.finish(sample, running)
