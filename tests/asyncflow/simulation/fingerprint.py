"""The identity of a simulated state, so that two paths to the same state are recognised.

A state is a multiset of facts about rows and prompts, and the remaining state of the parts. Numbers that only identify
something (deliveries, tickets) are left out. Ids are replaced by roles: prompts and samples of which the same facts
hold are interchangeable, so two states that differ only by a permutation of them count as one. The order of rows that
will leave together in one firing does not count either.

This merges only states with the same future, because events depend on ids in one place only: among equally old prompts
the batcher takes the lowest id. `like_enough` checks at every batch that the prompts between which it chooses are
interchangeable, so that the choice is one between two names of the same state. Where rows may arrive again after their
prompt has settled, prompts keep the order of their ids and rows keep their positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any

import msgspec

from asyncflow.control.admission.inflight_prompts import _oldest as oldest_of
from asyncflow.control.device_lease import PoolLease, shared_leases
from asyncflow.services.channels.outbox import Outbox
from asyncflow.services.channels.row_table import RowTable
from protocols.data.columns import Batch
from protocols.data.ids import BASELINE_INDEX, index_of, place_of, prompt_of
from protocols.stage import Failure
from tests.asyncflow.simulation.generation import Engine, GeneratingStage
from tests.asyncflow.simulation.network import Delivery
from tests.asyncflow.simulation.rows import Request, Row
from tests.asyncflow.simulation.service import Service
from tests.asyncflow.simulation.stages import ClosingStage, RowStage, TrainingStage
from tests.asyncflow.simulation.turns import OpenLease
from tests.asyncflow.simulation.world import World

Print = tuple[Any, ...]
MASK = (1 << 64) - 1


class State(msgspec.Struct, frozen=True):
    """A state's hash, and for each prompt a hash of the facts about it."""

    name: int
    parts: dict[int, int]


class Facts:
    """All facts about rows, (what, ((sample, value), ...)), and about prompts, (what, prompt)."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: list[tuple[Print, tuple[tuple[int, Any], ...]]] = []
        self.prompts: list[tuple[Print, int]] = []
        faults = world.config.faults
        self.sends_again = bool(faults.losses or faults.restarts)
        self.comes_again = self.sends_again or bool(faults.duplicates)
        # A firing takes the first `firing_rows` rows, whose order among each other does not matter.
        self.firing = 1 if self.comes_again else world.config.firing_rows

    def row(self, what: Print, sample: int, value: Any = None) -> None:
        """A fact about one row."""
        self.rows.append((what, ((sample, self.value(value)),)))

    def together(self, what: Print, rows: Iterable[tuple[int, Any]]) -> None:
        """A fact about several rows that move together, in their order."""
        self.rows.append((what, tuple((s, self.value(v)) for s, v in rows)))

    def each_prompt(self, what: Print, prompts: Iterable[int]) -> None:
        """A fact about each of these prompts."""
        self.prompts += [(what, p) for p in prompts]

    def value(self, value: Any) -> Any:
        """A row's content. Its owner counts only in so far as the row can be read or not."""
        match value:
            case Row():
                return value.generation, value.oldest, value.critic, self.world.readable(value.owner)
            case Request():
                return value.min_version
            case Failure():
                return "dead"
        return value

    def delivery(self, what: Print, d: Delivery) -> None:
        """The rows of a delivery; those of a batch have no order."""
        if d.step < 0:
            self.together((*what, d.edge, d.attempt), d.rows)
            return
        for sample, _ in d.rows:
            self.row((*what, d.edge, d.step), sample)

    def state(self, rest: Print) -> State:
        """Replace ids by roles: rows and prompts are numbered by the facts about them."""
        signatures: defaultdict[int, int] = defaultdict(int)
        for what, rows in self.rows:
            for place, (sample, value) in enumerate(rows):
                signatures[sample] += hash((what, len(rows), place // self.firing, value))
        of_prompt: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for sample, signature in signatures.items():
            of_prompt[prompt_of(sample)].append((signature & MASK, sample))
        parts: defaultdict[int, int] = defaultdict(int)
        for what, prompt in self.prompts:
            parts[prompt] += hash(what)
        for prompt, samples in of_prompt.items():
            samples.sort()
            parts[prompt] += hash(tuple((s, index_of(n) == BASELINE_INDEX) for s, n in samples))
        order = sorted(parts) if self.comes_again else sorted(parts, key=lambda p: (parts[p], p))
        prompts = {prompt: place for place, prompt in enumerate(order)}
        names = {
            sample: (prompts[prompt], BASELINE_INDEX if index_of(sample) == BASELINE_INDEX else place)
            for prompt, samples in of_prompt.items()
            for place, (_, sample) in enumerate(samples)
        }
        total = sum(
            hash((what, frozenset([(place // self.firing, names[s], v) for place, (s, v) in enumerate(rows)])))
            for what, rows in self.rows
        )
        total += sum(hash((what, prompts[prompt])) for what, prompt in self.prompts)
        return State(hash((rest, total)), dict(parts))


def fingerprint(world: World) -> State:
    """The identity of a state. Equal names mean equal futures, up to a permutation of prompts and samples."""
    facts = Facts(world)
    network = world.network
    for d in network.flights.values():
        facts.delivery(("in flight", d.number in network.awaited.get(d.sender, ())), d)
    if facts.sends_again:
        for sender, waits in network.awaited.items():
            for d in waits.values():
                facts.delivery(("awaited", sender), d)
    rest = (
        _controller(facts),
        [_service(facts, s) for s in world.services.values()],
        [_stage(facts, s) for s in world.stages.values()],
        [_engine(facts, e) for e in world.engines],
        [(s, len(w)) for s, w in sorted(network.awaited.items()) if w],
        list(network.to_resend),
        [_lease(world, lease) for lease in {lease.pool: lease for lease in world.leases.values()}.values()],
        list(world.faults_left.values()),
    )
    doomed = _doomed(facts)
    _ended(facts)
    return facts.state((repr(rest), doomed, world.victim if world.faults_left["restarts"] else ""))


def _doomed(facts: Facts) -> Print:
    """The rows that will fail. A prompt that is not admitted yet is identified by its place in the queue."""
    fates = facts.world.controller.fates
    for where, sample in facts.world.doomed:
        if prompt_of(sample) in fates:
            facts.row(("doomed", where), sample)
    to_come = [(where, sample) for where, sample in facts.world.doomed if prompt_of(sample) not in fates]
    return tuple((where, place_of(prompt_of(s))[1] - len(fates), index_of(s)) for where, s in to_come)


def like_enough(world: World, state: State) -> bool:
    """Whether the next batch is determined by age, or chooses only between interchangeable prompts."""
    controller = world.controller
    chosen = controller.choice() if controller.training is None and not controller.finished else None
    if chosen is None or Facts(world).comes_again:
        return True
    oldest = chosen[-1].oldest_version
    tied = [p for p, settled in controller.inflight._complete.items() if oldest_of(settled) == oldest]
    taken = {r.prompt_id for r in chosen}
    return taken >= set(tied) or len({state.parts[p] for p in tied}) == 1


def _table(
    facts: Facts, where: Print, table: RowTable[Any], closed: Container[int] | None = None, apart: int = 1
) -> None:
    """The facts of a row table. `apart` rows are taken together, so that only their group's position counts.

    `closed` are the complete prompts of a join. Their rows leave together, and count with their oldest version only.
    """
    for place, sample in enumerate(table._complete):
        facts.row((*where, "settled", place // apart if closed is None else -1), sample)
    for sample, held in table._held.items():
        whole = closed is not None and not facts.comes_again and prompt_of(sample) in closed
        for position, value in held.slots.items():
            facts.row((*where, "held", held.attempt, position), sample, None if whole else _held(value))
    for sample, attempt in table._left.items():
        facts.row((*where, "left", attempt), sample)


def _held(value: Any) -> Any:
    """What a join holds for a row: the number of its generation, and a version."""
    if not (type(value) is tuple and isinstance(value[0], Batch)):
        return value
    batch, row = value
    found = [getattr(batch, name, None) for name in ("log_probs", "values", "scores", "costs", "versions")]
    return tuple(float(c[row] if not hasattr(c, "offsets") else c.values[row]) for c in found if c is not None)


def _ended(facts: Facts) -> None:
    """Which parts know that a prompt has ended, for the ended prompts of which any row still exists."""
    known = {prompt_of(s) for _, rows in facts.rows for s, _ in rows} | {p for _, p in facts.prompts}
    over = [p for p in known if p not in facts.world.controller.min_versions]
    if not over:
        return
    holders: list[tuple[str, Any]] = [(s.name, s.outbox._finished) for s in facts.world.services.values()]
    for stage in facts.world.stages.values():
        if isinstance(stage, RowStage | GeneratingStage):
            holders.append((stage.name, stage.table._finished))
        elif isinstance(stage, ClosingStage):
            holders.append((stage.name, stage.join._samples._finished))
    for name, ended in holders:
        facts.each_prompt(("ended", name), [p for p in over if p in ended])


def _outbox(facts: Facts, name: str, outbox: Outbox[Any]) -> None:
    """The facts of an outbox. If nothing is ever sent again, only the prompts that must still end count."""
    if not facts.sends_again:
        facts.each_prompt(("kept", name), {p for _, needed in outbox._open.values() for p in needed})
        return
    for edge, entries in outbox._kept.items():
        for place, sent in enumerate(entries.values()):
            if isinstance(sent, Delivery):
                facts.delivery(("kept", place), sent)
            else:
                facts.each_prompt(("kept", edge, place), sent)


def _lease(world: World, lease: PoolLease) -> Print:
    """The state of a lease. Without a queue in calling order it also counts how many grants passed each claim by."""
    holder = lease.holder.stage if lease.holder is not None else ""
    if isinstance(lease, OpenLease):
        return lease.pool, holder, sorted(claim.stage for claim in lease.waiting)
    in_line = world.rules.leases is shared_leases
    passed = [(c.stage, 0 if in_line else world.watch.passed_by(lease, c.ticket)) for c in lease.waiting]
    return lease.pool, holder, passed


def _service(facts: Facts, s: Service) -> Print:
    _outbox(facts, s.name, s.outbox)
    for place, prompts in enumerate(s.to_end):
        facts.each_prompt(("to end", s.name, place), prompts)
    thread = s.thread.name if s.thread is not None else ""
    # Whether it has died determines how much it may hold.
    return s.weights, min(s.incarnation, 1), thread, [p.name for p in s.queue], sorted(s.claims)


def _stage(facts: Facts, stage: Any) -> Print:
    name = stage.name
    match stage:
        case RowStage():
            _table(facts, (name,), stage.table, apart=facts.firing)
            facts.together((name, "taken"), stage.taken)
            facts.together((name, "dead"), [(f.sample_id, f) for f in stage.dead])
            for sample in stage.failing:
                facts.row((name, "failing"), sample)
            return stage.phase, stage.attempt
        case ClosingStage():
            _table(facts, (name, "samples"), stage.join._samples, stage.join._closed)
            _table(facts, (name, "baselines"), stage.join._baselines, stage.join._closed)
            facts.each_prompt((name, "whole"), stage.settled)
            facts.each_prompt((name, "closed"), stage.join._closed)
        case GeneratingStage():
            _table(facts, (name,), stage.table)
            for sample in stage.running:
                facts.row((name, "running"), sample)
            for place, (sample, attempt, row) in enumerate(stage.out):
                facts.row((name, "out", place // facts.firing, attempt), sample, row)
        case TrainingStage():
            if stage.batch is not None:
                facts.delivery((name, "batch"), stage.batch)
            return stage.newest, stage.phase
    return ()


def _engine(facts: Facts, engine: Engine) -> Print:
    for sample, r in engine.running.items():
        facts.row((engine.name, r.attempt, r.turns, r.oldest, r.failing, r.request.min_version), sample)
    return engine.own_version, list(engine.loads), engine.phase


def _controller(facts: Facts) -> Print:
    c = facts.world.controller
    for prompt, min_version in c.min_versions.items():
        # The version at admission no longer matters once a prompt is settled for good.
        is_open = facts.sends_again or prompt not in c.inflight._complete
        facts.prompts.append((("live", min_version if is_open else -1, c.attempts[prompt]), prompt))
    for prompt, settled in c.inflight._complete.items():
        facts.prompts.append((("ready", oldest_of(settled)), prompt))
    for prompt, notices in c.notices.items():
        unread = tuple((bool(s.dead), oldest_of(s)) for s in notices)
        facts.prompts.append((("unread", unread), prompt))
    _outbox(facts, c.name, c.outbox)
    training = None
    if c.training is not None:
        training = c.training.step, sorted(c.training.done), c.training.published
        facts.each_prompt(("in training",), [r.prompt_id for r in c.training.batch])
    return c.version, training, c.newest_weights, c.admission.live, c.admission.incomplete
