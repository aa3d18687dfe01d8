"""The simulated controller: admission, batches, publication, and the fate of every prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from asyncflow.control.admission.staleness import CompletePrompt, check_age
from asyncflow.dataflow.graph import SOURCE
from protocols.control.notices import PromptSettled
from protocols.data.ids import BASELINE_INDEX, prompt_id, sample_id
from tests.asyncflow.simulation.network import Action, Delivery
from tests.asyncflow.simulation.rows import Owner, Request
from tests.asyncflow.simulation.stages import TrainingStage

if TYPE_CHECKING:
    from tests.asyncflow.simulation.world import World

UNLIMITED = 1 << 30


class Training(msgspec.Struct):
    """The step that is being trained."""

    step: int
    batch: list[CompletePrompt]
    done: set[str] = msgspec.field(default_factory=set)  # stages
    published: bool = False


class Controller:
    """Decides with the real admission, in-flight prompts and leases. It never dies: that would roll the run back."""

    name = "controller"
    owner: Owner = ("controller", 0)

    def __init__(self, world: World) -> None:
        config, rules = world.config, world.rules
        self._world = world
        self.admission = rules.admission(config.prompts, config.staleness, config.steps)
        self.admission.window = config.window or self.admission.window
        self.inflight = rules.inflight_prompts(self.admission, UNLIMITED)
        self.outbox = rules.outbox()  # prompts only: a repeated delivery is built again, under the current attempt
        self.min_versions: dict[int, int] = {}  # live prompts
        self.attempts: dict[int, int] = {}  # live prompts
        self.fates: dict[int, str] = {}  # every prompt
        self.notices: dict[int, deque[PromptSettled]] = {}  # unread, by prompt: those of two may overtake each other
        self.training: Training | None = None
        self.newest_weights = 0  # published
        self.late_weights: deque[int] = deque()  # committed but unpublished: only without a rule
        self._chosen: list[CompletePrompt] | None = None
        self._stale = False

    @property
    def version(self) -> int:
        return self.admission.version

    @property
    def _publishes(self) -> bool:
        """Whether weights must be published: a policy that generates itself has them already."""
        return not self._world.hybrid

    @property
    def finished(self) -> bool:
        return self.version == self._world.config.steps

    def actions(self) -> Iterator[Action]:
        if self.admission.room() and not self.finished:
            yield Action(self.name, "admit")
        for prompt in self.notices:
            yield Action(self.name, "hear", prompt)
        if self.late_weights:
            yield Action(self.name, "publish late")
        if self.training is None:
            if not self.finished and self.choice() is not None:
                yield Action(self.name, "close")
            return
        policy_done = any(self._world.config.dataflow.stage(s).service == "policy" for s in self.training.done)
        if policy_done and not self.training.published and self._publishes and self._world.rules.publishes_first:
            yield Action(self.name, "publish")
        if self._may_commit(policy_done):
            yield Action(self.name, "commit")

    def do(self, action: Action) -> None:
        match action.verb:
            case "admit":
                self._admit(self.admission.room())
            case "hear":
                self._hear(self._next_notice(action.item))
            case "close":
                self._close()
            case "publish":
                assert self.training is not None
                self.training.published = True
                self._publish(self.training.step + 1)
            case "publish late":
                self._publish(self.late_weights.popleft())
            case "commit":
                self._commit()
        self._stale = True
        self._tell_ended()

    # --- prompts

    def _admit(self, room: int) -> None:
        prompts = [prompt_id(0, len(self.fates) + i) for i in range(room)]
        self.inflight.admit(prompts)
        for prompt in prompts:
            self.fates[prompt] = "live"
            self.min_versions[prompt], self.attempts[prompt] = self.version, 0
        self._world.watch.budget(self.admission, len(self.min_versions))
        for channel in self._world.config.dataflow.consumers(SOURCE):
            samples = [s for p in prompts for s in self._rows(p, channel.grain == "prompt")]
            self.outbox.keep(channel.edge, samples, tuple(prompts))
            self._hand_out(channel.edge, prompts)

    def redelivery(self, edge: str) -> list[Delivery]:
        """The prompts that a generating stage may have lost, under their current attempt."""
        prompts = dict.fromkeys(p for kept in self.outbox.kept(edge) for p in kept if p in self.min_versions)
        return self._deliveries(edge, [p for p in prompts if p not in self._in_training()])

    def regenerate(self) -> None:
        """The generator's rows are lost and generated again, which voids all rows that derive from the old ones."""
        for prompt in self.min_versions.keys() - self._in_training():
            self.attempts[prompt] += self._world.rules.new_attempts

    def _in_training(self) -> set[int]:
        return {r.prompt_id for r in self.training.batch} if self.training is not None else set()

    def _hand_out(self, edge: str, prompts: list[int]) -> None:
        for delivery in self._deliveries(edge, prompts):
            self._world.network.fly(delivery)

    def _deliveries(self, edge: str, prompts: list[int]) -> list[Delivery]:
        stage, _ = self._world.inlets[edge]
        greedy = self._world.config.dataflow.stage(stage.name).greedy
        return [
            Delivery(
                self._world.network.number(),
                edge,
                self.name,
                self.owner,
                attempt,
                tuple(
                    (s, Request(self.min_versions[p], self.owner))
                    for p in prompts
                    if self.attempts[p] == attempt
                    for s in self._rows(p, greedy)
                ),
            )
            for attempt in sorted({self.attempts[p] for p in prompts})
        ]

    def _rows(self, prompt: int, greedy: bool) -> list[int]:
        return [sample_id(prompt, i) for i in ([BASELINE_INDEX] if greedy else range(self._world.config.samples))]

    def notify(self, settled: PromptSettled) -> None:
        """Receive a notice of the join."""
        self.notices.setdefault(settled.prompt_id, deque()).append(settled)

    def _next_notice(self, prompt: int) -> PromptSettled:
        notice = self.notices[prompt].popleft()
        if not self.notices[prompt]:
            del self.notices[prompt]
        return notice

    def _hear(self, settled: PromptSettled) -> None:
        self.inflight.complete(settled)
        if settled.dead:
            self._end(settled.prompt_id, "failed")

    def join_died(self) -> None:
        """The join lost its rows, and its unread notices are void: its prompts have to become complete again."""
        assert self.training is None, "the loss of a batch in training is a loss of trained state"
        self.notices.clear()
        self.inflight.mark_incomplete()
        self._stale = True

    def droppable(self) -> list[int]:
        """Complete prompts that dynamic sampling could still filter out."""
        busy = self._in_training() | self.notices.keys()
        return sorted((self._world.closing.settled & self.min_versions.keys()) - busy)

    def drop(self, prompt: int) -> None:
        """Drop a prompt whose scores are equal. The join drops its rows first: its refill may follow at once."""
        if self._world.rules.join_hears_first:
            self._world.closing.end([prompt])
        self.inflight.drop(prompt)
        self._end(prompt, "dropped")
        self._stale = True
        self._tell_ended()

    def _end(self, prompt: int, fate: str) -> None:
        self._world.watch.ends_once(prompt, self.fates.get(prompt), fate)
        self.fates[prompt] = fate
        del self.min_versions[prompt], self.attempts[prompt]

    def _tell_ended(self) -> None:
        ended = self.inflight.take_finished()
        self.outbox.end(ended)
        for service in self._world.services.values() if ended else ():
            service.to_end.append(ended)

    # --- steps

    def choice(self) -> list[CompletePrompt] | None:
        """The batch that could be closed now."""
        if self._stale:
            self._chosen, self._stale = self.inflight.choose(), False
        return self._chosen

    def _close(self) -> None:
        batch = self.choice()
        assert batch is not None
        ages = check_age(batch, self.version, self._world.config.staleness)
        self._world.watch.ages |= {(self.version, age) for age in ages}
        self.training = Training(self.version, batch)
        self._world.closing.close(self.version, [s for p in self.inflight.notices_of(batch) for s in p.alive])

    def rows_of_choice(self) -> list[int]:
        """The samples that a batch would have if it were formed now."""
        return [s for p in self.inflight.notices_of(self.inflight.choose() or []) for s in p.alive]

    def done(self, stage: TrainingStage, step: int) -> None:
        """A trainer finished a step."""
        if self.training is not None and self.training.step == step:
            self.training.done.add(stage.name)

    def _publish(self, version: int) -> None:
        """The snapshot is taken at once; each replica loads it when its turn comes."""
        self.newest_weights = version
        self._world.watch.snapshot(self.newest_weights, self._world.services["policy"].weights)
        for engine in self._world.engines:
            engine.load(self.newest_weights)

    def _may_commit(self, policy_done: bool) -> bool:
        assert self.training is not None
        sinks = {s.name for s in self._world.config.dataflow.sinks}
        if not (policy_done if self._world.rules.rises_after == "policy" else self.training.done == sinks):
            return False
        if not self._publishes or not self._world.rules.publishes_first:
            return True
        return any(e.version > self.training.step for e in self._world.engines)

    def _commit(self) -> None:
        assert self.training is not None
        batch, self.training = self.training.batch, None
        if self._publishes and not self._world.rules.publishes_first:
            self.late_weights.append(self.version + 1)
        self.inflight.commit(batch)
        for prompt in batch:
            self._end(prompt.prompt_id, "trained")
        for sink in self._world.sinks if self._world.rules.update_keeps_lease else ():
            sink.release()
        self._world.watch.budget(self.admission, len(self.min_versions))
