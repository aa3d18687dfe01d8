"""Which action may happen at once, with nothing else tried in its place: whoever waits for what, it loses nothing.

An action `a` that can happen in a state is *free* there if for every other action `b` that can happen there

    a can still happen after b, and is still free;
    a then b and b then a lead to the same state;
    if b breaks a rule, it, or a delivery that comes later, does so after a, too.

Then the exploration takes `a` alone. No deadlock is lost: take a way from here to a deadlock. It has `a` in it,
for nothing but `a` itself ever disables `a`. Where it stands in the way it can be exchanged with the action before
it, again and again, until it comes first: the deadlock is reached through `a`. No violation is lost: take a way to
one. If `a` is in it, as above; if not, `a` put before it changes nothing of what happens on it, and the rest of the
way is no longer than it was. Runs have no circles (the exploration raises Livelock where it sees one), so this can
not go on for ever without going the way. The third line holds for what only ever grows by deliveries and is only
checked there, the rows at a join: made earlier they are all the more there at the last of them.

So the argument hangs on three lines about two actions. They are reasons in the comments below, and
`test_reduction.py` has them checked in the states of random ways through small spaces and large ones, and that
each broken rule is still found. Two stages that race for one thread are tried in both orders, and nothing else is:
`free_race`, by the same argument for the two together.

What a broken rule changes can make free what is not; a rule that does is asked for here.

Failures need one thing more. When a row fails is nobody's business before it leaves its stage, so a run with one
failure is a run whose one doomed row is known from the start, and the exploration takes each row in turn: what can
happen is the same, and nobody has to wait whether it fails. Whose process dies is taken in turn likewise.
"""

from __future__ import annotations

from asyncflow.placement.lease import shared_leases
from protocols.ids import prompt_of
from tests.asyncflow.simulation.generation import Engine, GeneratingStage
from tests.asyncflow.simulation.network import Action, Delivery
from tests.asyncflow.simulation.service import Service
from tests.asyncflow.simulation.stages import CallSite, ClosingStage, RowStage, TrainingStage
from tests.asyncflow.simulation.world import World


def free_action(world: World, actions: list[Action]) -> Action | None:
    """One that is free, or None where the order counts, or may count."""
    left = world.faults_left
    if left["losses"] or left["duplicates"] or left["failures"] or world.network.to_resend:
        return None  # every delivery may be the one
    return next((action for action in actions if is_free(world, action)), None)


def free_race(world: World, actions: list[Action]) -> list[Action]:
    """Two stages of a service of which each would be free to take its rows but for the other; else nothing."""
    if any(world.faults_left[fault] for fault in ("losses", "duplicates", "failures")) or world.network.to_resend:
        return []
    for service in world.services.values():
        racing = [a for a in actions if a.verb == "take" and world.stages[a.who].service is service]
        if len(racing) > 1 and service.thread is None:
            stages = [world.stages[a.who] for a in racing]
            if all(_take_is_free(world, stage, stages) for stage in stages):
                return racing
    return []


def is_free(world: World, action: Action) -> bool:
    """See the module."""
    if action.who == "network":
        return _delivery_is_free(world, world.network.flights[action.item])
    if action.verb == "end":
        return _end_is_free(world, world.services[action.who])
    if action.who == world.controller.name:
        match action.verb:
            case "hear":
                return _hearing_is_free(world)
            case "publish":
                # The snapshot is taken of weights that wait for it, and the loads wait in line.
                return _is_split(world) and not _may_die(world, *(s.service.name for s in world.generating))
        return False
    stage = world.stages.get(action.who)
    if stage is None:
        engine = next(e for e in world.engines if e.name == action.who)
        return action.verb in ("start", "load") and _engine_is_free(world, engine, action)
    if isinstance(stage, GeneratingStage):
        return _sending_is_free(world, stage)
    return (action.verb == "finish" and _finish_is_free(world, stage)) or (
        action.verb == "take" and _take_is_free(world, stage)
    )


# --- who may die, and what stands still


def _may_die(world: World, *services: str) -> bool:
    if not world.faults_left["restarts"]:
        return False
    if not world.victim:
        return True
    return world.victim.split("/")[0] in services


def _is_split(world: World) -> bool:
    return not world.leases


def _neighbours(world: World, stage: CallSite) -> set[str]:
    """The services that a stage's rows come from and go to, and its own."""
    flow = world.config.dataflow
    names = [c.source for c in flow.inputs_of(stage.name)] + [c.destination for c in flow.consumers(stage.name)]
    return {world.stages[n].service.name for n in names if n in world.stages} | {stage.service.name}


def _draws_anew(world: World) -> bool:
    """Rows of two attempts are about, and which comes first counts."""
    return any(s.service.incarnation for s in world.generating)


def _stands_still_without(world: World, prompts: set[int]) -> bool:
    """No step is trained and no prompt admitted before these prompts have moved on."""
    c, config = world.controller, world.config
    admission = c.admission
    ahead = min(admission.staleness + 1, admission.steps - admission.version)
    counts = world.watch.counts
    may_die = world.doomed or counts["fail"] != counts["failed"] or world.faults_left["drops"]
    if c.training is not None or may_die or ahead * admission.prompts_per_step > admission.live:
        return False
    return len(c.floors.keys() - prompts) < config.prompts


def _are_wanted(world: World, samples: list[int]) -> bool:
    """The prompts of these rows can not end before the rows are at the join."""
    settled = world.closing.settled | world.controller.notices.keys()
    return all((p := prompt_of(s)) in world.controller.floors and p not in settled for s in samples)


# --- deliveries


def _delivery_is_free(world: World, d: Delivery) -> bool:
    stage, _ = world.inlets[d.edge]
    if world.leases and world.rules.kept_while_sending != "nothing":
        return False  # the last delivery gives the devices back
    if _may_die(world, stage.service.name, d.owner[0]) or _draws_anew(world):
        return False
    if isinstance(stage, ClosingStage):
        # It is a set, and grows. Where a batch may be closed on rows that the join has lost, who comes first counts.
        return not any(
            p in world.controller.book._settled and p not in stage.settled for p in map(prompt_of, d.samples)
        )
    if any(other.edge == d.edge for other in world.network.flights.values() if other is not d):
        return False
    if isinstance(stage, TrainingStage):
        return True  # one batch a step
    if not _are_wanted(world, d.samples):
        return False
    if isinstance(stage, RowStage):
        # Nothing to take before it has come, and its sender waits with the next.
        waits = d.number in world.network.awaited.get(d.sender, ())
        return stage.capacity is not None and not len(stage.table) and waits
    # Requests: nobody else to be drawn, nor to be asked for.
    return (_is_split(world) or len(world.generating) == 1) and world.controller.floors.keys() <= {
        prompt_of(s) for s in d.samples
    }


def _end_is_free(world: World, service: Service) -> bool:
    """It is told of prompts of which nothing is about that could still come to it."""
    over = set(service.to_end)
    victim = world.victim if world.faults_left["restarts"] else ""
    if world.faults_left["restarts"] and (not victim or _may_die(world, service.name)):
        return False
    if victim and any(
        _may_die(world, world.stages[c.destination].service.name)
        for s in service.parts
        if isinstance(s, CallSite)
        for c in world.config.dataflow.consumers(s.name)
    ):
        return False
    return not over & set(_about(world))


def _about(world: World) -> list[int]:
    """Prompts of which a row is somewhere on its way."""
    samples = [s for d in world.network.flights.values() for s in d.samples]
    for waits in world.network.awaited.values():
        samples += [s for d in waits.values() for s in d.samples]
    for stage in world.stages.values():
        if isinstance(stage, RowStage):
            samples += [*stage.table._held, *(s for s, _ in stage.taken), *(f.sample_id for f in stage.dead)]
        elif isinstance(stage, GeneratingStage):
            samples += [*stage.table._held, *stage.running, *(s for s, _, _ in stage.out)]
        elif isinstance(stage, ClosingStage):
            samples += [*stage.join._samples._held, *stage.join._baselines._held]
    return [prompt_of(s) for s in samples]


# --- the controller


def _hearing_is_free(world: World) -> bool:
    """Nothing can be closed or admitted before it, and there is nothing else to hear."""
    c = world.controller
    if world.faults_left["restarts"] or world.faults_left["drops"] or c.training is not None:
        return False
    if len(c.notices) > 1 or c.choice() is not None or c.admission.room():
        return False
    # Other prompts may settle meanwhile, and be heard first: with this one, and before it, there is no batch.
    told = set(c.notices)
    unsettled = c.floors.keys() - c.book._settled.keys() - told
    return not unsettled or (
        _stands_still_without(world, told) and len(c.book._settled) + len(unsettled) < c.admission.prompts_per_step
    )


# --- stages


def _finish_is_free(world: World, stage: CallSite) -> bool:
    """What was worked on is done: who has the devices after it is settled where they are its own."""
    if _may_die(world, *_neighbours(world, stage)):
        return False
    lease = stage.service.lease
    if lease is None:
        return True
    # Whoever is next in line begins. An engine begins with the requests that are there: none may be on its way.
    if lease.waiting and not any(lease.waiting[0].stage == engine.name for engine in world.engines):
        return world.rules.leases is shared_leases
    asked = any(isinstance(world.inlets[d.edge][0], GeneratingStage) for d in world.network.flights.values())
    return world.rules.leases is shared_leases and _all_admitted(world) and not asked


def _take_is_free(world: World, stage: CallSite, racing: list[CallSite] | None = None) -> bool:
    """What it takes is all that it can get, and nobody else can get the thread first."""
    if stage.service.lease is not None or _may_die(world, *_neighbours(world, stage)) or _draws_anew(world):
        return False
    prompts: set[int] = set()
    if isinstance(stage, RowStage):
        if (
            stage.capacity is None
            or len(stage.table) < stage.capacity
            or not _are_wanted(world, list(stage.table._held))
        ):
            return False
        prompts = {prompt_of(s) for s in stage.table._held}
    others = [part for part in stage.service.parts if part is not stage and part not in (racing or [])]
    return all(_asks_not(world, part, prompts) for part in others)


def _asks_not(world: World, part: object, prompts: set[int]) -> bool:
    """Whether another part of a service can't ask for its thread before these prompts have moved on."""
    if isinstance(part, TrainingStage):
        return part.batch is None and part.phase == "idle" and _stands_still_without(world, prompts)
    if isinstance(part, RowStage):
        return part.phase == "idle" and not len(part.table) and not _may_come(world, part, prompts)
    return False


def _may_come(world: World, stage: CallSite, prompts: set[int]) -> bool:
    """Whether rows for a stage may come before these prompts have moved on."""
    if not _stands_still_without(world, prompts) and not _all_admitted(world):
        return True
    upstream = [c.source for c in world.config.dataflow.inputs_of(stage.name)]
    if any(d.edge.startswith(f"{stage.name}.") for d in world.network.flights.values()):
        return True
    for name in upstream:
        source = world.stages.get(name)
        if isinstance(source, GeneratingStage):
            if len(source.table) or source.running or source.out or _may_come(world, source, prompts):
                return True
        elif isinstance(source, RowStage) and (
            len(source.table) or source.phase != "idle" or _may_come(world, source, prompts)
        ):
            return True
    return False


def _all_admitted(world: World) -> bool:
    c = world.controller
    counts = world.watch.counts
    if world.doomed or counts["fail"] != counts["failed"] or world.faults_left["drops"]:
        return False
    return (
        c.admission.version * c.admission.prompts_per_step + c.admission.live
        >= c.admission.steps * c.admission.prompts_per_step
    )


# --- generation


def _engine_is_free(world: World, engine: Engine, action: Action) -> bool:
    if engine.service.leased or len(world.engines) > 1 or _may_die(world, engine.service.name) or _draws_anew(world):
        return False
    if action.verb == "load":
        # Nothing is drawn before it: rows are admitted by the commit that waits for it.
        nothing = not engine.running and not any(len(s.table) for s in world.generating)
        return (
            nothing
            and len(engine.loads) == 1
            and not any(_may_come(world, s, set(world.controller.floors)) for s in world.generating)
        )
    if len(world.generating) > 1:
        waiting = sum(len(s.table) for s in world.generating)
        room = world.config.slots - len(engine.running)
        if waiting > room or any(_may_come(world, s, set(world.controller.floors)) for s in world.generating):
            return False
    stage = next(s for s in world.generating if s.table.is_settled(action.item))
    return next(iter(stage.table._settled)) == action.item and _are_wanted(world, [action.item])


def _sending_is_free(world: World, stage: GeneratingStage) -> bool:
    """No row of it is still to be drawn."""
    if len(stage.table) or stage.running or _may_die(world, *_neighbours(world, stage)) or _draws_anew(world):
        return False
    return not _may_come(world, stage, {prompt_of(s) for s, _, _ in stage.out}) and _are_wanted(
        world, [s for s, _, _ in stage.out]
    )
