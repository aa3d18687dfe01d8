"""The simulated stages: each is a small state machine around the real row table or join.

row stage       idle -> asking -> working -> sending -> idle
training stage  idle -> asking -> working -> idle
closing stage   accepts rows, and closes a batch when the controller requests it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from asyncflow.dataflow.graph import Stage as Call
from protocols.data.columns import Batch
from protocols.data.ids import prompt_of
from protocols.data.messages import Values
from protocols.stage import Failure
from tests.asyncflow.simulation.network import Action, Delivery
from tests.asyncflow.simulation.rows import Request, Row, contents, message
from tests.asyncflow.simulation.service import Service

if TYPE_CHECKING:
    from tests.asyncflow.simulation.world import World

Phase = Literal["idle", "asking", "working", "sending"]
Given = Row | Failure


class CallSite(ABC):
    """The common part of a service's stages: a `Part` that accepts deliveries."""

    def __init__(self, world: World, service: Service, call: Call) -> None:
        self.world, self.service, self.call, self.name = world, service, call, call.name

    @abstractmethod
    def has_room(self, position: int, delivery: Delivery) -> bool:
        """Whether there is room for a delivery of an input now."""

    @abstractmethod
    def accept(self, position: int, delivery: Delivery) -> None:
        """Accept a delivery."""

    def actions(self) -> Iterator[Action]:
        yield from ()

    def do(self, action: Action) -> None:
        raise NotImplementedError(action)

    def begin(self) -> None:
        raise NotImplementedError(f"{self.name} claims no devices")

    def sent(self) -> None:  # noqa: B027 - only stages that wait for credit override it
        """All its deliveries were accepted."""

    def end(self, prompts: list[int]) -> None:  # noqa: B027 - a trainer holds nothing per prompt
        """These prompts have ended."""

    def restart(self) -> None:  # noqa: B027 - trainers are not restarted here
        """Its process died."""

    def send(self, rows: Sequence[tuple[int, Given]], attempt: int = 0, step: int = -1) -> None:
        """Send rows to every consumer; the outbox keeps one delivery for each."""
        if not self.world.rules.tombstones:
            rows = [(s, v) for s, v in rows if not isinstance(v, Failure)]
        if not rows:
            return
        for channel in self.world.config.dataflow.consumers(self.name):
            delivery = Delivery(
                self.world.network.number(), channel.edge, self.name, self.service.owner, attempt, tuple(rows), step
            )
            self.service.outbox.keep(channel.edge, delivery.samples, delivery)
            self.world.network.send(delivery)


class RowStage(CallSite):
    """log_probs, values, score: rows in, rows out; tombstones are passed on."""

    def __init__(self, world: World, service: Service, call: Call) -> None:
        super().__init__(world, service, call)
        self.capacity = world.config.capacity if len(call.inputs) == 1 else None
        self.largest = 0  # rows of the largest delivery so far
        self.restart()

    def restart(self) -> None:
        self.table = self.world.rules.row_table(len(self.call.inputs))
        self.phase: Phase = "idle"
        self.taken: list[tuple[int, Row]] = []
        self.dead: list[Failure] = []
        self.attempt = 0
        self.failing: set[int] = set()

    def has_room(self, position: int, delivery: Delivery) -> bool:
        if self.capacity is None:
            return True
        fresh = self.table.fresh(position, delivery.samples, delivery.attempt)
        return self.world.rules.has_room(len(self.table), len(fresh), self.capacity)

    def accept(self, position: int, delivery: Delivery) -> None:
        self.table.arrive(position, delivery.rows, delivery.attempt)
        if self.capacity is not None:
            self.largest = max(self.largest, len(delivery.rows))  # an empty mailbox accepts it
            self.world.watch.bound("mailbox", self.name, len(self.table), max(self.capacity, self.largest))
        else:
            # Regenerated rows may arrive after their prompt has settled, or has ended and the notice is unread.
            prompts = self.world.config.most_live + len(self.service.unread_ended)
            self.world.watch.bound("middle join", self.name, len(self.table), prompts * self.world.config.samples)

    def actions(self) -> Iterator[Action]:
        if self.phase == "idle" and self.table.complete >= self.world.rules.fires_on:
            yield Action(self.name, "take")
        elif self.phase == "working":
            yield Action(self.name, "finish")

    def do(self, action: Action) -> None:
        if action.verb == "take":
            self._take()
        else:
            self._finish()

    def begin(self) -> None:
        self.phase = "working"
        self.failing |= {s for s, _ in self.taken if self.world.is_doomed(self.name, s)}

    def sent(self) -> None:
        self.service.leave(self)
        self.phase = "idle"

    def end(self, prompts: list[int]) -> None:
        self.table.end(prompts)

    def _take(self) -> None:
        """Take the complete rows; unreadable ones are taken back and requested again."""
        joined = self.table.take(self.table.next_complete(self.world.config.firing_rows, self.world.rules.in_id_order))
        self.world.watch.fired(self.name, joined.samples)
        read = list(zip(joined.samples, zip(*joined.inputs, strict=True), strict=False))
        lost = [s for s, inputs in read if not all(self.world.readable(row.owner) for row in inputs)]
        self.taken = [(s, inputs[0]) for s, inputs in read if s not in lost]
        for sample, inputs in read:
            self.world.watch.one_generation(self.name, sample, [row.generation for row in inputs])
        self.dead, self.attempt, self.failing = joined.failures, joined.attempt, set()
        if lost:
            self.world.watch.count("unreadable", len(lost))
            self.table.take_back(lost)
            if self.world.rules.asks_again:
                for channel in self.world.config.dataflow.inputs_of(self.name):
                    self.world.network.redeliver(channel.edge)
        if self.taken:
            self.phase = "asking"
            self.service.ask(self)
        else:
            self._emit([])

    def _finish(self) -> None:
        kept = self.world.rules.kept_while_sending
        if kept != "thread":
            self.service.leave_thread(self)
        if kept != "lease":
            self.service.leave_lease(self)
        critic = self.service.weights if self.call.produces is Values else -1
        computed: list[tuple[int, Given]] = []
        for sample, row in self.taken:
            value = Row(row.generation, row.oldest, critic, self.service.owner)
            computed.append((sample, Failure(sample, "failed") if sample in self.failing else value))
        self._emit(computed)

    def _emit(self, rows: list[tuple[int, Given]]) -> None:
        rows += [(f.sample_id, f) for f in self.dead]
        self.taken, self.dead = [], []
        self.send(rows, self.attempt)
        if self.world.network.waits(self.name):
            self.phase = "sending"
            self.world.watch.nothing_held(self.service, self)
        else:
            self.sent()


class ClosingStage(CallSite):
    """The join before the batch. It reads rows when they arrive, so it keeps them when their producer dies."""

    def __init__(self, world: World, service: Service, call: Call) -> None:
        super().__init__(world, service, call)
        self.channels = world.config.dataflow.inputs_of(call.name)
        self.restart()

    def restart(self) -> None:
        self.join = self.world.rules.prompt_join([c.grain for c in self.channels], self.world.config.samples)
        self.settled: set[int] = set()  # complete prompts that wait for a batch

    def has_room(self, position: int, delivery: Delivery) -> bool:
        return self.world.rules.join_room(self.join, position, delivery.samples)

    def accept(self, position: int, delivery: Delivery) -> None:
        failures = [value for _, value in delivery.rows if isinstance(value, Failure)]
        rows = [(s, v) for s, v in delivery.rows if isinstance(v, Row) and self.world.readable(v.owner)]
        batch = message(self.channels[position].message, rows) if rows else None
        settled, _ = self.join.arrive(position, batch, failures, delivery.attempt)
        self.settled |= {prompt.prompt_id for prompt in settled if not prompt.dead}
        self._check_bounds()
        for prompt in settled:
            self.world.controller.notify(prompt)

    def end(self, prompts: list[int]) -> None:
        self.join.end(prompts)
        self.settled.difference_update(prompts)

    def close(self, step: int, samples: list[int]) -> None:
        """Turn these rows into the experience of a step."""
        inputs = self.join.take(samples)
        self.settled -= set(map(prompt_of, samples))
        rows = self._check_batch(step, samples, inputs)
        self.send(rows, step=step)

    def _check_bounds(self) -> None:
        config, watch = self.world.config, self.world.watch
        per_prompt = config.rows_per_prompt
        waiting = self.join.depth - len(self.settled - self.world.controller.notices.keys()) * per_prompt
        # A successor receives the rows of all live prompts again, settled or not.
        window = config.most_live if self.service.incarnation else self.world.controller.admission.window
        watch.bound("join, incomplete", self.name, waiting, window * per_prompt)
        watch.bound("join, all", self.name, self.join.depth, config.most_live * per_prompt)

    def _check_batch(self, step: int, samples: list[int], inputs: tuple[Batch, ...]) -> list[tuple[int, Given]]:
        """Each sample's inputs derive from one generation, and none of them is too old."""
        rows: list[tuple[int, Given]] = []
        by_sample = [
            contents(batch) for batch, channel in zip(inputs, self.channels, strict=True) if channel.grain == "sample"
        ]
        self.world.watch.batch(step, samples, [[row.sample for row in column] for column in map(contents, inputs)])
        for row in zip(*by_sample, strict=True):
            self.world.watch.row(step, row[0].sample, [r.generation for r in row], [r.version for r in row])
            rows.append((row[0].sample, Row(row[0].generation, row[0].version, -1, self.service.owner)))
        return rows


class TrainingStage(CallSite):
    """update: trains each closed batch once, one after the other."""

    def __init__(self, world: World, service: Service, call: Call) -> None:
        super().__init__(world, service, call)
        self.newest = -1  # the newest step that it received
        self.batch: Delivery | None = None
        self.phase: Phase = "idle"

    def has_room(self, position: int, delivery: Delivery) -> bool:
        return self._had(delivery) or self.batch is None

    def accept(self, position: int, delivery: Delivery) -> None:
        if self._had(delivery):
            return
        self.newest = delivery.step
        self.batch = delivery

    def actions(self) -> Iterator[Action]:
        if self.phase == "idle" and self.batch is not None:
            yield Action(self.name, "take")
        elif self.phase == "working":
            yield Action(self.name, "finish")

    def do(self, action: Action) -> None:
        if action.verb == "take":
            self.phase = "asking"
            self.service.ask(self)
        else:
            self._finish()

    def begin(self) -> None:
        assert self.batch is not None
        self.phase = "working"
        if not self.world.rules.one_batch and (samples := self.world.controller.rows_of_choice()):
            rows = tuple((s, Row(1, 0, -1, self.service.owner)) for s in samples)
            self.batch = self.batch._replace(rows=rows)
        if self.service.name == "policy":
            divisors = [self._divisor(row) for _, row in self.batch.rows]
            self.world.watch.divides_by(self.batch.step, self.service.weights, divisors)

    def _divisor(self, row: Row | Failure | Request) -> int:
        """The version of the weights whose log-probs the ratio of a row divides by."""
        assert isinstance(row, Row)
        return self.service.weights if self.world.rules.prox == "of the update" else row.oldest

    def release(self) -> None:
        """Give back devices that were kept until the weights were published."""
        self.service.leave(self)

    def _had(self, delivery: Delivery) -> bool:
        return delivery.step <= self.newest and self.world.rules.trains_once

    def _finish(self) -> None:
        assert self.batch is not None
        self.world.watch.trained(self.name, self.batch.step, [(s, v) for s, v in self.batch.rows])
        step, self.batch, self.phase = self.batch.step, None, "idle"
        self.service.weights += 1
        if not self.world.rules.update_keeps_lease:
            self.service.leave(self)
        self.world.controller.done(self, step)
