"""What a state of the world is, so that two ways to the same state are seen as one.

Numbers that only name things (deliveries, tickets) are left out, and so is the order of what nobody reads in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from asyncflow.control.prompt_book import PromptBook
from asyncflow.placement.lease import PoolLease
from asyncflow.services.ended import EndedPrompts
from asyncflow.services.outbox import Outbox
from asyncflow.services.prompt_join import PromptJoin
from asyncflow.services.row_table import RowTable
from protocols.columns import Batch
from protocols.stage import Failure
from tests.asyncflow.simulation.controller import Controller
from tests.asyncflow.simulation.generation import Engine, GeneratingStage
from tests.asyncflow.simulation.network import Delivery
from tests.asyncflow.simulation.rows import Request, Row
from tests.asyncflow.simulation.service import Service
from tests.asyncflow.simulation.stages import ClosingStage, RowStage, TrainingStage
from tests.asyncflow.simulation.world import World

Print = tuple[Any, ...]


def fingerprint(world: World) -> int:
    """Equal for states from which the same can happen."""
    network = world.network
    return hash(
        (
            _controller(world, world.controller),
            tuple(_service(world, s) for s in world.services.values()),
            tuple(_stage(world, s) for s in world.stages.values()),
            tuple(_engine(e) for e in world.engines),
            _any_order(_delivery(world, d) for d in network.flights.values()),
            tuple((s, _any_order(_delivery(world, d) for d in w.values())) for s, w in sorted(network.awaited.items())),
            tuple(network.to_resend),
            tuple(_lease(lease) for lease in {lease.pool: lease for lease in world.leases.values()}.values()),
            tuple(world.faults_left.values()),
        )
    )


def _any_order(items: Iterable[Any]) -> Print:
    return tuple(sorted(items, key=repr))


def _value(world: World, value: Any) -> Any:
    match value:
        case Row():
            return value.drawing, value.oldest, value.critic, world.readable(value.owner)
        case Request():
            return value.floor
        case Failure():
            return "dead"
        case Delivery():
            return _delivery(world, value)
        case (Batch(), row):
            return _row_of(value[0], row)
    return value


def _row_of(batch: Batch, row: int) -> Print:
    """What the join holds of a row: the number of its drawing, and a version."""
    columns = [
        getattr(batch, name) for name in ("log_probs", "values", "scores", "costs", "versions") if hasattr(batch, name)
    ]
    return tuple(float(c[row]) if not hasattr(c, "offsets") else float(c.values[row]) for c in columns)


def _delivery(world: World, d: Delivery) -> Print:
    return d.edge, d.attempt, d.step, tuple((s, _value(world, v)) for s, v in d.rows)


def _table(world: World, table: RowTable[Any], *, in_order: bool = True) -> Print:
    held = tuple(
        (s, row.attempt, tuple((p, _value(world, v)) for p, v in sorted(row.slots.items())))
        for s, row in sorted(table._held.items())
    )
    settled = tuple(table._settled) if in_order else tuple(sorted(table._settled))
    return held, settled, tuple(sorted(table._left.items())), _ended(table._ended)


def _ended(ended: EndedPrompts) -> Print:
    return tuple(ended._starts), tuple(ended._stops)


def _join(world: World, join: PromptJoin) -> Print:
    return (
        _table(world, join._samples, in_order=False),
        _table(world, join._baselines, in_order=False),
        tuple((p, tuple(sorted(s))) for p, s in sorted(join._settled.items())),
        tuple(sorted(join._closed)),
    )


def _outbox(world: World, outbox: Outbox[Any]) -> Print:
    kept = (
        (edge, tuple(sorted(outbox._open[n][1])), _value(world, sent))
        for edge, entries in outbox._kept.items()
        for n, sent in entries.items()
    )
    return _any_order(kept), _ended(outbox._ended)


def _lease(lease: PoolLease) -> Print:
    holder = lease.holder.stage if lease.holder is not None else ""
    return lease.pool, holder, tuple(claim.stage for claim in lease.waiting)


def _service(world: World, s: Service) -> Print:
    thread = s.thread.name if s.thread is not None else ""
    claims, queue = tuple(sorted(s.claims)), tuple(p.name for p in s.queue)
    # How often it died tells how much it may hold.
    died = min(s.incarnation, 1)
    return s.weights, died, _outbox(world, s.outbox), thread, queue, claims, tuple(sorted(s.to_end))


def _stage(world: World, stage: Any) -> Print:
    match stage:
        case RowStage():
            taken = tuple((s, _value(world, r)) for s, r in stage.taken)
            dead = tuple(f.sample_id for f in stage.dead)
            return _table(world, stage.table), stage.phase, taken, dead, stage.attempt, tuple(sorted(stage.failing))
        case ClosingStage():
            return _join(world, stage.join), tuple(sorted(stage.settled))
        case GeneratingStage():
            out = tuple((s, attempt, _value(world, v)) for s, attempt, v in stage.out)
            return _table(world, stage.table), tuple(sorted(stage.running)), out
        case TrainingStage():
            batch = _delivery(world, stage.batch) if stage.batch is not None else None
            return stage.newest, batch, stage.phase
    raise TypeError(stage)


def _engine(engine: Engine) -> Print:
    running = tuple((s, r.attempt, r.turns, r.oldest, r.failing) for s, r in sorted(engine.running.items()))
    return engine.own_version, tuple(engine.loads), running, engine.phase


def _controller(world: World, c: Controller) -> Print:
    training = (c.training.step, _any_order(c.training.done), c.training.published) if c.training is not None else None
    return (
        c.version,
        tuple(sorted(c.floors.items())),
        tuple(sorted(c.attempts.items())),
        len(c.fates),
        _book(c.book),
        tuple((s.prompt_id, bool(s.dead), s.oldest_version, s.critic_version) for s in c.notices),
        training,
        c.newest_weights,
        _outbox(world, c.outbox),
    )


def _book(book: PromptBook) -> Print:
    return tuple((p, s.oldest_version, s.critic_version) for p, s in sorted(book._settled.items()))
