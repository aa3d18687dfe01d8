"""Partial-order reduction: in some states it is enough to explore one action, and no error is missed.

An action `a` that is possible in a state is *free* there if for every other possible action `b`, faults included,

    1. after `b`, `a` is still possible and still free;
    2. `a` then `b` and `b` then `a` lead to the same state, and prompts end alike on both paths;
    3. an error that `b` raises it also raises after `a`; and if `a` raises an error after some other actions, then
       one of those actions raises one after `a`.

Then only `a` is explored. Proof: by 1, `a` stays possible on every path until it is taken itself. So every path to an
end of the run, finished or deadlocked, contains `a`, and by 2 it can be exchanged with its predecessor again and
again until it comes first. A path to an error either contains `a`, and is reordered likewise with 3; or it does not,
and then by 3 the same actions also reach an error after `a`. An infinite path stays infinite, so cycles are preserved.

**A firing counts as one step.** Finishing is free and is taken first. So where choices are explored only engines
compute, and a stage that begins a firing finishes it before anything else happens. Conditions 1 to 3 therefore compare
whole firings: if two stages need one thread the second waits, and the resulting state is the same.

**Shared devices.** The lease of the exploration may grant any waiting claim (see `turns`), which permits more orders
than the real lease. So to claim devices is free. A firing `a` may be free although another claimant, `b`, can take
the devices first and make `a` impossible for a while: a holder waits for nobody and gives the devices back (`explores`
requires the rules that ensure it). So no run ends in between, and 1 and 2 hold when `b` stands for all that its holder
does until it gives the devices back. The order of grants therefore matters only where one claimant trains weights that
another uses, and for engines, which begin with the requests that are there.

**Faults.** The reasons beside each kind of action rely on this: if no delivery is lost or duplicated and no process
dies, each row crosses each edge once and reaches the join before its prompt settles. So a settled prompt has no rows
anywhere else, and only a prompt's own rows can settle it. `explores` requires that, except for drops, for one failure
of a row that is chosen at the start, and for one death of a process that is chosen at the start. Actions near that
process are not free, neither before its death nor after it; if the process that generates may die no action is free,
because all rows are then generated again. `exhaustive.starts` goes through all choices of rows and processes. Choosing
the row at the start misses nothing, because a failure has no effect before the row leaves its stage.

`explores` also requires each scheduling rule that the reasons name; without it all orders are explored. If two stages
race for one thread or lease, both orders are explored and nothing else (`free_race`), by the same argument for
whichever comes first. `test_reduction` checks conditions 1 and 2 in the states of small spaces.
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
    """Whether the reduction's requirements hold for this run, so that actions may be free."""
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
    """A free action, firings that can finish first; None if there is none, so that all orders must be explored."""
    if not explores(world):
        return None
    in_order = sorted(actions, key=lambda action: action.verb != "finish")
    return next((action for action in in_order if is_free(world, action)), None)


def free_race(world: World, actions: list[Action]) -> list[Action]:
    """The actions of stages of one service that would each be free to compute but for one another; else []."""
    if not explores(world):
        return []
    for service in world.services.values():
        racing = {s: a for a in actions if (s := _next_of(world, a)) is not None and s.service is service}
        if len(racing) > 1 and all(_turn_is_free(world, stage, racing) for stage in racing):
            return list(racing.values())
    return []


def _next_of(world: World, action: Action) -> CallSite | None:
    """The stage that begins to compute by this action: on granted devices, or on its service's own."""
    name = action.item if action.verb == "grant" else action.who
    stage = world.stages.get(name) if action.verb in ("grant", "take") else None
    if stage is None or (action.verb == "take" and (stage.service.leased or not _takes_all(world, stage))):
        return None
    return stage


def is_free(world: World, action: Action) -> bool:
    """Whether an action is free (see the module). Requires `explores`."""
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


# --- what can't happen meanwhile


def _dies(world: World, *services: str) -> bool:
    """Whether the process that may die, or has died, is one of these."""
    return world.victim in services


def _engine_dies(world: World) -> bool:
    """Whether the process that may die is an engine. The rows that it has generated survive it."""
    return any(_dies(world, engine.name) for engine in world.engines)


def _nothing_ends(world: World) -> bool:
    """Prompts end only by being trained."""
    return not world.fated and not world.config.faults.drops


def _stands_still_without(world: World, prompts: set[int]) -> bool:
    """No step is trained and no prompt admitted before one of these prompts has settled.

    Admission has no room, and only a commit makes room. No step is in training, and the other live prompts are too
    few for a batch.
    """
    c = world.controller
    if c.training is not None or c.admission.room() or not _nothing_ends(world) or world.config.window:
        return False
    return len(c.min_versions.keys() - prompts) < world.config.prompts


def _is_still(world: World, prompts: set[int]) -> bool:
    """No prompt is admitted before one of these has settled, or none is admitted any more."""
    return (_all_admitted(world) and _nothing_ends(world)) or _stands_still_without(world, prompts)


def _all_admitted(world: World) -> bool:
    """No prompt is admitted any more, provided that prompts end only by being trained."""
    a = world.controller.admission
    return a.version * a.prompts_per_step + a.live >= a.steps * a.prompts_per_step


def _may_come(world: World, stage: CallSite, still: bool) -> bool:
    """Whether rows may still arrive at a stage. `still` states that no prompt is admitted in the meantime."""
    if not still:
        return True
    if any(d.edge.startswith(f"{stage.name}.") for d in world.network.flights.values()):
        return True
    sources = [world.stages.get(c.source) for c in world.config.dataflow.inputs_of(stage.name)]
    return any(s is not None and (_is_busy(s) or _may_come(world, s, still)) for s in sources)


def _is_busy(stage: CallSite) -> bool:
    """Whether a stage has rows that it has not sent yet."""
    if isinstance(stage, GeneratingStage):
        return bool(len(stage.table) or stage.running or stage.out)
    return not isinstance(stage, RowStage) or bool(len(stage.table)) or stage.phase != "idle"


# --- deliveries


def _delivery_is_free(world: World, d: Delivery) -> bool:
    """Nothing acts on the delivery before it arrives, and its sender sends no other one for the edge until then."""
    stage, _ = world.inlets[d.edge]
    if _dies(world, stage.service.name, d.owner[0]):
        return False
    if isinstance(stage, ClosingStage):
        # The join holds a set of rows, which deliveries only enlarge and which is checked against its bounds at each of
        # them. An earlier delivery makes the set only larger at the last one. The exception is the last row of a prompt
        # with a failed row, which empties its place in the join at once.
        return not any(prompt_of(s) in world.fated for s in d.samples)
    if any(other.edge == d.edge for other in world.network.flights.values() if other is not d):
        return False
    match stage:
        case TrainingStage():
            return True  # one batch per step
        case RowStage():
            # There is nothing to take before it arrives, and nothing else arrives before it.
            return stage.capacity is not None and not len(stage.table) and d.sender in world.stages
        case GeneratingStage():
            return _request_is_free(world, d)
    return False


def _request_is_free(world: World, d: Delivery) -> bool:
    """It holds every live prompt, so nothing else is requested, trained or admitted before it arrives."""
    if _engine_dies(world) or (len(world.generating) > 1 and world.engines[0].service.leased):
        return False
    idle = all(e.phase == "idle" and not e.loads for e in world.engines if e.service.leased)
    return idle and world.controller.min_versions.keys() <= {prompt_of(s) for s in d.samples}


def _end_is_free(world: World, service: Service) -> bool:
    """The service holds no row of these prompts, and none is sent to it or requested from it any more.

    Not free at a process that may die or next to one: a successor receives what its senders kept, and so its consumers
    receive rows again.
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
    """The stage takes all rows that it can get before it fires, and all of them can be read."""
    sources = [world.stages.get(c.source) for c in world.config.dataflow.inputs_of(stage.name)]
    if any(_dies(world, s.service.name) for s in (stage, *sources) if s is not None):
        return False
    return not isinstance(stage, RowStage) or (stage.capacity is not None and len(stage.table) >= stage.capacity)


def _turn_is_free(world: World, stage: CallSite, racing: Container[Part] = ()) -> bool:
    """Until it computes, nobody trains the weights that it uses or uses the weights that it trains.

    Nothing else depends on when it computes: it has its rows, and its output only adds rows for others.
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
                asks = False  # an engine, whose rows are those of its stages
        if asks:
            return False
    return True


def _waits_for_trainers(world: World) -> bool:
    """No prompt is admitted before every trainer has finished the step."""
    return world.rules.rises_after == "all" and not world.controller.admission.room() and _nothing_ends(world)


# --- the controller


def _hearing_is_free(world: World, prompt: int) -> bool:
    """No batch can be closed without the prompt, and no prompt is admitted before the notice or because of it."""
    c = world.controller
    if _dies(world, world.closing.service.name) or not _nothing_ends(world) or world.config.window:
        return False
    in_training = {r.prompt_id for r in c.training.batch} if c.training is not None else set[int]()
    still = _all_admitted(world) or (c.training is None and not c.admission.room())
    return still and len(c.min_versions.keys() - in_training - {prompt}) < world.config.prompts


def _commit_is_free(world: World) -> bool:
    """No prompt is admitted before the commit, and prompts end only by it."""
    return _waits_for_trainers(world) and not world.config.window and not world.config.faults.restarts


def _publishing_is_free(world: World) -> bool:
    """The weights do not change before the snapshot, and loads queue in order."""
    return not any(e.service.leased for e in world.engines) and not _engine_dies(world)


# --- generation


def _start_is_free(world: World, engine: Engine, sample: int) -> bool:
    """The request is the first in its stage's queue, and there are slots for all requests."""
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
    """Nothing is left to generate, with the old weights or the new ones."""
    if engine.service.leased or _engine_dies(world):
        return False
    still = _all_admitted(world) and _nothing_ends(world)
    return not any(len(s.table) or s.running or _may_come(world, s, still) for s in world.generating)


def _sending_is_free(world: World, stage: GeneratingStage) -> bool:
    """The stage has no row left to generate, so the content of the delivery is final."""
    if len(stage.table) or stage.running or _engine_dies(world):
        return False
    return not _may_come(world, stage, _is_still(world, {prompt_of(s) for s, _, _ in stage.out}))
