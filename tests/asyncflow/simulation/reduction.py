"""Partial-order reduction: which action may be taken at once, without trying the others, and nothing is missed.

An action `a` that can happen in a state is *free* there if for every other action `b`, fault or not, that can happen

    1. `a` can still happen after `b`, and is still free;
    2. `a` then `b` and `b` then `a` lead to the same state, and prompts end the same in both;
    3. what `b` breaks it breaks after `a`, too; what `a` breaks after others, one of these breaks after `a`.

Then the exploration takes `a` alone. By 1, on any way from here only `a` itself ends that `a` can happen. So a way to
an end of the run, a deadlock or not, has `a` in it, and by 2, exchanged with the action before it again and again, `a`
comes first. A way to a breach has `a` in it, as before with 3, or not: then `a` put before it brings the breach no
further away. A way without end stays one likewise: circles are kept.

**A firing is one step.** To finish is free, and is taken first; so where anything is tried nobody computes but an
engine, and a stage that begins has finished before anything else happens. What is said of `a` and `b` is said of
whole firings, where they are some: of two stages for one thread the second waits, and the end is the same.

**Shared devices.** Their lease leaves open who is next (see `turns`): that is more than the real one lets happen. To
ask is free then. A firing is not kept from being free by one that takes the devices first, `b`, though it can't
happen while those have them: who holds devices waits for nobody and gives them back (`explores` asks for that), so a
run does not end before, and 1 and 2 hold with all that the holder does in the place of `b`. So who is next counts
only where one trains the weights that another uses, and for engines, which begin with what is there.

The reasons beside each kind of action rest on this. Where nothing is lost or doubled and no process dies, a row goes
over each edge once, and reaches the join before its prompt settles: of a prompt that has settled nothing is anywhere
else, and only its own rows can settle it. `explores` asks for that. Of faults there may be drops; a failure, of a row
that is known from the start; and one death, of a process that is known from the start. What is near to that process
is not free, neither before its death nor after it. Where the one that draws may die nothing is: all rows are drawn
anew then. Rows and processes are taken in turn by `exhaustive.starts`, by which nothing is lost, for when a row
fails is nobody's business before it leaves its stage.

`explores` asks for the rules that the reasons name: without one all orders are tried.

Two stages that race for one thread, or one lease, are tried in both orders, and nothing else is: `free_race`, by the
same argument for whichever of the two comes first. `test_reduction` checks 1 and 2 in the states of small spaces.
"""

from __future__ import annotations

from collections.abc import Container

from protocols.data.ids import prompt_of
from tests.asyncflow.simulation.generation import Engine, GeneratingStage
from tests.asyncflow.simulation.network import Action, Delivery
from tests.asyncflow.simulation.rules import joins_never_refuse
from tests.asyncflow.simulation.service import Part, Service
from tests.asyncflow.simulation.stages import CallSite, ClosingStage, RowStage, TrainingStage
from tests.asyncflow.simulation.turns import open_leases
from tests.asyncflow.simulation.world import World


def explores(world: World) -> bool:
    """Whether any action of this run may be free at all."""
    faults, rules = world.config.faults, world.rules
    if faults.losses or faults.duplicates or world.faults_left["failures"]:
        return False
    if faults.restarts and (faults.restarts > 1 or world.victim in ("", *(s.service.name for s in world.generating))):
        return False
    return (
        rules.join_room is joins_never_refuse
        and rules.kept_while_sending == "nothing"
        and rules.one_batch
        and rules.tombstones
        and not rules.update_keeps_lease
        and rules.loads == "in order"
        and rules.leases is open_leases
        and (rules.min_version == "before the slot" or not world.leases)
    )


def free_action(world: World, actions: list[Action]) -> Action | None:
    """One that is free, or None where the order counts, or may count. Who computes finishes first."""
    if not explores(world):
        return None
    in_order = sorted(actions, key=lambda action: action.verb != "finish")
    return next((action for action in in_order if is_free(world, action)), None)


def free_race(world: World, actions: list[Action]) -> list[Action]:
    """Two stages of a service of which each would be free to compute but for the other; else nothing."""
    if not explores(world):
        return []
    for service in world.services.values():
        racing = {s: a for a in actions if (s := _next_of(world, a)) is not None and s.service is service}
        if len(racing) > 1 and all(_turn_is_free(world, stage, racing) for stage in racing):
            return list(racing.values())
    return []


def _next_of(world: World, action: Action) -> CallSite | None:
    """The stage that computes by an action: on devices that it was granted, or its service's own."""
    name = action.item if action.verb == "grant" else action.who
    stage = world.stages.get(name) if action.verb in ("grant", "take") else None
    if stage is None or (action.verb == "take" and (stage.service.leased or not _takes_all(world, stage))):
        return None
    return stage


def is_free(world: World, action: Action) -> bool:
    """See the module. For a run that `explores`."""
    if action.who == "network":
        return _delivery_is_free(world, world.network.flights[action.item])
    if action.verb == "end":
        return _end_is_free(world, world.services[action.who])
    if action.who == world.controller.name:
        match action.verb:
            case "hear":
                return _hearing_is_free(world, action.item)
            case "publish":
                return _publishing_is_free(world)
            case "commit":
                return _commit_is_free(world)
        return False
    if action.verb == "grant":
        stage = world.stages.get(action.item)
        return stage is not None and _turn_is_free(world, stage)
    stage = world.stages.get(action.who)
    if isinstance(stage, GeneratingStage):
        return _sending_is_free(world, stage)
    if stage is not None:
        if action.verb == "finish":
            return not _dies(world, stage.service.name)
        return _takes_all(world, stage) and (stage.service.leased or _turn_is_free(world, stage))
    engine = next(e for e in world.engines if e.name == action.who)
    match action.verb:
        case "start":
            return _start_is_free(world, engine, action.item)
        case "load":
            return _load_is_free(world, engine)
        case "ask":
            return not _engine_dies(world)
    return False


# --- what stands still


def _dies(world: World, *services: str) -> bool:
    """Whether one of them is the one that may die, or did."""
    return world.victim in services


def _engine_dies(world: World) -> bool:
    """Whether it is an engine that may die: what it has drawn lives on."""
    return any(_dies(world, engine.name) for engine in world.engines)


def _nothing_ends(world: World) -> bool:
    """No prompt ends but by being trained."""
    return not world.fated and not world.config.faults.drops


def _stands_still_without(world: World, prompts: set[int]) -> bool:
    """No step is trained and no prompt admitted before one of these prompts has settled.

    There is no room, and only a commit makes some; nothing is trained, and too few others are live for a batch.
    """
    c = world.controller
    if c.training is not None or c.admission.room() or not _nothing_ends(world) or world.config.window:
        return False
    return len(c.min_versions.keys() - prompts) < world.config.prompts


def _is_still(world: World, prompts: set[int]) -> bool:
    """No prompt is admitted before one of these has settled, or ever."""
    return (_all_admitted(world) and _nothing_ends(world)) or _stands_still_without(world, prompts)


def _all_admitted(world: World) -> bool:
    """No prompt is admitted any more, where none ends but by being trained."""
    a = world.controller.admission
    return a.version * a.prompts_per_step + a.live >= a.steps * a.prompts_per_step


def _may_come(world: World, stage: CallSite, still: bool) -> bool:
    """Whether rows may come to a stage; `still`: no prompt is admitted until nobody asks any more."""
    if not still:
        return True
    if any(d.edge.startswith(f"{stage.name}.") for d in world.network.flights.values()):
        return True
    sources = [world.stages.get(c.source) for c in world.config.dataflow.inputs_of(stage.name)]
    return any(s is not None and (_is_busy(s) or _may_come(world, s, still)) for s in sources)


def _is_busy(stage: CallSite) -> bool:
    """Whether a stage has rows that it has not sent."""
    if isinstance(stage, GeneratingStage):
        return bool(len(stage.table) or stage.running or stage.out)
    return not isinstance(stage, RowStage) or bool(len(stage.table)) or stage.phase != "idle"


# --- deliveries


def _delivery_is_free(world: World, d: Delivery) -> bool:
    """Of those for one stage nobody acts on it before it has come, and its sender waits with the next."""
    stage, _ = world.inlets[d.edge]
    if _dies(world, stage.service.name, d.owner[0]):
        return False
    if isinstance(stage, ClosingStage):
        # Rows at the join are a set. It only grows by deliveries, and bounds are checked there: made earlier, it is
        # all the larger at the last of them. That is not so of the last row of a prompt that is dead: it goes at once.
        return not any(prompt_of(s) in world.fated for s in d.samples)
    if any(other.edge == d.edge for other in world.network.flights.values() if other is not d):
        return False
    match stage:
        case TrainingStage():
            return True  # one batch a step
        case RowStage():
            # Nothing to take before it has come, and until it has come nothing else does.
            return stage.capacity is not None and not len(stage.table) and d.sender in world.stages
        case GeneratingStage():
            return _request_is_free(world, d)
    return False


def _request_is_free(world: World, d: Delivery) -> bool:
    """All that lives is in it: nothing else is asked for, trained or admitted before it has come."""
    if _engine_dies(world) or (len(world.generating) > 1 and world.engines[0].service.leased):
        return False
    idle = all(e.phase == "idle" and not e.loads for e in world.engines if e.service.leased)
    return idle and world.controller.min_versions.keys() <= {prompt_of(s) for s in d.samples}


def _end_is_free(world: World, service: Service) -> bool:
    """It has nothing of these prompts but the memory of what left, and nobody sends or asks for more of them.

    A successor is sent what its senders keep, and by it others have rows again: so not where these are told.
    """
    flow = world.config.dataflow
    for stage in [p for p in service.parts if isinstance(p, CallSite)]:
        near = [c.destination for c in flow.consumers(stage.name)] + [c.source for c in flow.inputs_of(stage.name)]
        if any(_dies(world, world.stages[n].service.name) for n in [stage.name, *near] if n in world.stages):
            return False
    over = set(service.to_end[0])
    return not any(prompt_of(sample) in over for part in service.parts for sample in _held(part))


def _held(part: object) -> list[int]:
    match part:
        case RowStage():
            return [*part.table._held, *(s for s, _ in part.taken), *(f.sample_id for f in part.dead)]
        case GeneratingStage():
            return [*part.table._held, *part.running, *(s for s, _, _ in part.out)]
        case ClosingStage():
            return [*part.join._samples._held, *part.join._baselines._held]
    return []


# --- stages


def _takes_all(world: World, stage: CallSite) -> bool:
    """What it takes is all that it can get, and can be read."""
    sources = [world.stages.get(c.source) for c in world.config.dataflow.inputs_of(stage.name)]
    if any(_dies(world, s.service.name) for s in (stage, *sources) if s is not None):
        return False
    return not isinstance(stage, RowStage) or (stage.capacity is not None and len(stage.table) >= stage.capacity)


def _turn_is_free(world: World, stage: CallSite, racing: Container[Part] = ()) -> bool:
    """Nobody trains the weights that it uses, or uses those that it trains, before it has been.

    For what else happens it is of no account when it computes: it has its rows, and what it makes of them is only
    more for others.
    """
    if _dies(world, stage.service.name):
        return False
    prompts = {prompt_of(s) for s in _held(stage)}
    still = _is_still(world, prompts) or (isinstance(stage, TrainingStage) and _waits_for_trainers(world))
    trains = isinstance(stage, TrainingStage)
    for other in (part for part in stage.service.parts if part is not stage and part not in racing):
        match other:
            case RowStage() | GeneratingStage():
                asks = trains and (_is_busy(other) or _may_come(world, other, still))
            case TrainingStage():
                coming = any(d.edge.startswith(f"{other.name}.") for d in world.network.flights.values())
                asks = other.batch is not None or coming or not _stands_still_without(world, prompts)
            case _:
                asks = False  # an engine: its rows are its stages'
        if asks:
            return False
    return True


def _waits_for_trainers(world: World) -> bool:
    """No prompt is admitted before every trainer has had the step."""
    return world.rules.rises_after == "all" and not world.controller.admission.room() and _nothing_ends(world)


# --- the controller


def _hearing_is_free(world: World, told: int) -> bool:
    """Nothing can be closed without the prompt, nor admitted before or by it."""
    c = world.controller
    if _dies(world, world.closing.service.name) or not _nothing_ends(world) or world.config.window:
        return False
    in_training = {r.prompt_id for r in c.training.batch} if c.training is not None else set[int]()
    still = _all_admitted(world) or (c.training is None and not c.admission.room())
    return still and len(c.min_versions.keys() - in_training - {told}) < world.config.prompts


def _commit_is_free(world: World) -> bool:
    """No prompt is admitted before it, and none ends but by it."""
    return _waits_for_trainers(world) and not world.config.window and not world.config.faults.restarts


def _publishing_is_free(world: World) -> bool:
    """The snapshot is taken of weights that wait for it, and the loads wait in line."""
    return not any(e.service.leased for e in world.engines) and not _engine_dies(world)


# --- generation


def _start_is_free(world: World, engine: Engine, sample: int) -> bool:
    """It is the first in the line of its stage, and there are slots for all that is asked for."""
    if len(world.engines) > 1 or _engine_dies(world):
        return False
    if len(world.generating) > 1:
        waiting = sum(len(s.table) for s in world.generating)
        room = world.config.slots - len(engine.running)
        still = _is_still(world, {prompt_of(sample)})
        if waiting > room or any(_may_come(world, s, still) for s in world.generating):
            return False
    return any(next(iter(s.table._complete), None) == sample for s in world.generating)


def _load_is_free(world: World, engine: Engine) -> bool:
    """There is nothing to be drawn any more, with old weights or new."""
    if engine.service.leased or _engine_dies(world):
        return False
    still = _all_admitted(world) and _nothing_ends(world)
    return not any(len(s.table) or s.running or _may_come(world, s, still) for s in world.generating)


def _sending_is_free(world: World, stage: GeneratingStage) -> bool:
    """No row of it is still to be drawn, so what is sent is settled."""
    if len(stage.table) or stage.running or _engine_dies(world):
        return False
    return not _may_come(world, stage, _is_still(world, {prompt_of(s) for s, _, _ in stage.out}))
