"""A plan: the best placement, its times and memory, the runner-up, and the gain from more devices."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from asyncflow.planner.costs.devices import GB, Cluster, Refused
from asyncflow.planner.costs.layouts import Layout, LayoutChoice
from asyncflow.planner.costs.set_costs import Allows, SetCosts
from asyncflow.planner.costs.workload import ModelWork, Workload, with_separate_generator
from asyncflow.planner.search.mapper import STAGES, Split

VISIBLE = 1e-3  # differences below this share of a step are not reported
KEEP = 2  # placements for each way to generate: the best and the runner-up


class PlacedModel(msgspec.Struct, frozen=True):
    """A model's layout, its seconds in each stage of a step, and its gigabytes on the heaviest device."""

    role: str
    shape: str
    parallel: str  # p-t-d
    recompute: bool
    generation: str  # p_g-t_g; "" if it does not generate
    engines: int
    stage_s: dict[str, float]
    resident_gb: float
    transient_gb: float  # only while it trains or infers
    cache_gb: float  # of the KV cache, only while it generates


class PlannedPool(msgspec.Struct, frozen=True):
    """Models that take turns on the same devices."""

    devices: int  # may be more than its models use, if more would slow them
    busy_s: float  # seconds of a step in which one of the models runs
    peak_gb: float  # of one device, without the KV cache
    models: tuple[PlacedModel, ...]

    @property
    def name(self) -> str:
        return "+".join(model.role for model in self.models)


class Placement(msgspec.Struct, frozen=True):
    """Pools side by side, with the predicted seconds of a step and of its stages."""

    step_s: float
    stage_s: dict[str, float]
    pools: tuple[PlannedPool, ...]

    @property
    def name(self) -> str:
        """The pools with their devices: "policy+reference on 64, critic on 32"."""
        return ", ".join(f"{pool.name} on {pool.devices}" for pool in self.pools)


class Plan(msgspec.Struct, frozen=True):
    """The best placement of some models on a cluster, compared with others."""

    cluster: str
    usable_gb: float  # of one device
    staleness: int
    chosen: Placement
    runner_up: Placement | None
    reason: str  # why the runner-up lost
    bound_s: float  # lower bound on the seconds of a step
    with_more: dict[int, float]  # number of additional devices -> seconds a step


def make_plan(
    models: Sequence[ModelWork], cluster: Cluster, workload: Workload, allows: Allows = lambda model, layout: True
) -> Plan:
    """Search placements in which the policy generates itself, and those with a separate generator.

    Raises Refused, with the numbers, if the models do not fit.
    """
    extras = (1, cluster.device.devices_per_node)
    ranked: list[tuple[Split, SetCosts]] = []
    refusals: list[Refused] = []
    bounds: list[float] = []
    steps: dict[int, list[float]] = {extra: [] for extra in extras}
    for works in ways_to_generate(models):
        try:
            costs = SetCosts(works, cluster, workload, extra=max(extras), allows=allows)
            ranked += [(split, costs) for split in costs.best(cluster.count, KEEP)]
            bounds.append(costs.bound_s(cluster.count))
            for extra, found in steps.items():
                found.append(costs.best(cluster.count + extra)[0].step_s)
        except Refused as refusal:
            refusals.append(refusal)
    if not ranked:
        raise refusals[0]
    ranked.sort(key=lambda pair: pair[0].step_s)
    chosen, *others = (_placement(split, costs) for split, costs in ranked[:KEEP])
    runner_up = others[0] if others else None
    return Plan(
        cluster=str(cluster),
        usable_gb=cluster.device.usable_bytes / GB,
        staleness=workload.staleness,
        chosen=chosen,
        runner_up=runner_up,
        reason=why(chosen, runner_up) if runner_up else "",
        bound_s=min(bounds),
        with_more={extra: min(found) for extra, found in steps.items()},
    )


def ranked(
    works: Sequence[ModelWork], cluster: Cluster, workload: Workload, keep: int, allows: Allows
) -> list[Placement]:
    """The `keep` best placements of exactly these models. Raises Refused."""
    costs = SetCosts(works, cluster, workload, allows=allows)
    return [_placement(split, costs) for split in costs.best(cluster.count, keep)]


def why(chosen: Placement, other: Placement) -> str:
    """Why `other` is slower than `chosen`, stage by stage."""
    differences = {stage: other.stage_s[stage] - chosen.stage_s[stage] for stage in STAGES}
    visible = VISIBLE * chosen.step_s
    slower = [f"{stage} takes {_s(more)} longer" for stage, more in differences.items() if more >= visible]
    faster = [f"{stage} {_s(-more)} shorter" for stage, more in differences.items() if more <= -visible]
    busiest, busy = (max(p.pools, key=lambda pool: pool.busy_s) for p in (other, chosen))
    if busiest.busy_s >= other.step_s * (1 - 1e-9) and busiest.busy_s > busy.busy_s and len(other.pools) > 1:
        slower.append(f"its busiest pool, {busiest.name}, works {_s(busiest.busy_s)} a step")
    reason = "; ".join(slower or ["no stage is faster"])
    return f"{reason}; {', '.join(faster)}" if slower and faster else reason


def format_plan(plan: Plan) -> str:
    """The plan as text: a block per pool, a line per model, then the stages, the runner-up and more devices."""
    best = plan.chosen
    mode = "synchronous" if not plan.staleness else f"staleness {plan.staleness}"
    lines = [f"{plan.cluster}, {mode}: {_s(best.step_s)} a step"]
    for pool in best.pools:
        busy = 100 * pool.busy_s / best.step_s
        lines.append(f"+- {pool.devices} devices, busy {busy:.0f} %, {pool.peak_gb:.1f} of {plan.usable_gb:.1f} GB")
        lines += [f"|  {_line(model)}" for model in pool.models]
    lines.append("stages: " + ", ".join(f"{stage} {_s(seconds)}" for stage, seconds in best.stage_s.items()))
    if other := plan.runner_up:
        slower = 100 * (other.step_s / best.step_s - 1)
        lines.append(f"runner-up: {other.name}: {_s(other.step_s)}, {slower:.1f} % slower: {plan.reason}")
    lines.append(f"bound: no placement takes less than {_s(plan.bound_s)}, even with each stage at its own optimum")
    for extra, seconds in plan.with_more.items():
        saved = best.step_s - seconds
        gain = f"{_s(saved)} a step" if saved >= VISIBLE * best.step_s else "nothing"
        lines.append(f"{extra} more device{'s' if extra > 1 else ''} would save {gain}")
    return "\n".join(lines)


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _line(model: PlacedModel) -> str:
    times = ", ".join(f"{stage} {_s(seconds)}" for stage, seconds in model.stage_s.items() if seconds)
    cache = f"{model.cache_gb:.1f} GB of KV cache"
    at = f", {model.engines} engines at {model.generation} with {cache}" if model.engines else ""
    recompute = ", recomputing" if model.recompute else ""
    memory = f"{model.resident_gb:.1f} GB resident, {model.transient_gb:.1f} GB while it computes"
    return f"{model.role:<10} {model.shape} at {model.parallel}{at}{recompute}: {times}; {memory}"


def ways_to_generate(models: Sequence[ModelWork]) -> list[list[ModelWork]]:
    """The models unchanged and, if the policy both trains and generates, also with a separate generator."""
    together = list(models)
    separate = with_separate_generator(models)
    return [together] if separate == together else [together, separate]


def _placement(split: Split, costs: SetCosts) -> Placement:
    pools = []
    for mask, devices in split.sets:
        choice = costs.chosen[mask][devices]
        assert choice is not None, "the search takes finite costs only"
        placed = sorted(costs.parts(choice), key=lambda part: costs.models.index(part[0]))
        pools.append(
            PlannedPool(
                devices=devices,
                busy_s=choice.load_s,
                peak_gb=choice.peak / GB,
                models=tuple(_placed(model, layout, own, choice, costs) for model, layout, own in placed),
            )
        )
    return Placement(split.step_s, dict(zip(STAGES, split.vector, strict=False)), tuple(pools))


def _placed(model: ModelWork, layout: Layout, own: LayoutChoice, choice: LayoutChoice, costs: SetCosts) -> PlacedModel:
    return PlacedModel(
        role=model.role,
        shape=model.shape.name,
        parallel=str(layout.topology),
        recompute=layout.recompute,
        generation=f"{layout.gen_pp}-{layout.gen_tp}" if model.generates else "",
        engines=layout.engines if model.generates else 0,
        stage_s=dict(zip(STAGES, own.vector, strict=False)),
        resident_gb=own.resident / GB,
        transient_gb=own.transient / GB,
        cache_gb=costs.cache_bytes(choice, layout) / GB if model.generates else 0.0,
    )
