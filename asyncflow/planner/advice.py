"""`asyncflow plan --from RUN`: advice for a better placement, from the measured times of a run.

The run is simulated with its measured speeds; the ratio of measured to simulated step time scales all predictions.
Then every other grouping of its services on as many devices is simulated, and one more version of staleness.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.dataflow.graph import Dataflow
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import trace
from asyncflow.observe.journal import read_lines
from asyncflow.observe.timeline import idle_ratios, read_spans, union_seconds
from asyncflow.planner.calibration.measured_speeds import speeds_of
from asyncflow.planner.costs.workload import Lengths
from asyncflow.planner.search.mapper import placements
from asyncflow.planner.simulation.scenario import WARM_UP, Scenario
from asyncflow.planner.simulation.simulator import simulate
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.recipe.evaluations import is_evaluator
from asyncflow.recipe.service_specs import GENERATOR, pools_of, services_of
from asyncflow.services.runtime import CPU_SLOT
from protocols.control.notices import Span

LEAST_STEPS = 3  # after the warm-up, enough for a median
TURN_TOKENS = 16  # of an engine that starts new rows while others run
MIN_GAIN = 0.03  # of a move that is advised, as a share of the step
STEADY_STEPS = 6


class Move(msgspec.Struct, frozen=True):
    """Another placement, and its predicted gain."""

    what: str
    pools: dict[str, list[str]]  # pool -> services
    step_s: float
    gain: float  # share of the measured step that it saves


class Advice(msgspec.Struct, frozen=True):
    """Where a run spends its time, and which placements would be faster."""

    run: str
    steps: int  # that were measured
    step_s: float  # measured, median
    simulated_s: float  # the same placement, not scaled to the measured time
    busy: dict[str, float]  # service -> share of the time in which it was busy
    pool_idle: dict[str, float]  # pool -> share of the time in which no service of it was busy
    batch_wait: float  # share of the time in which training waited for a batch
    moves: list[Move]  # best first


def advise(folder: Path, recipe: Recipe) -> Advice:
    """Advice from a run's folder and its recipe. Raises BadInput if the run is too short for it."""
    dataflow = trace(algorithm_named(recipe.algorithm))
    steps = read_lines(folder / "metrics.jsonl")
    skipped = WARM_UP + recipe.staleness
    if len(steps) < skipped + LEAST_STEPS or not (folder / "timeline.json").exists():
        raise BadInput(
            f"plan --from {folder}: {len(steps)} steps are on record; advice needs a finished run of "
            f"{skipped + LEAST_STEPS} or more, the first {skipped} of which fill the pipeline"
        )
    spans = _steady(read_spans(folder / "timeline.json"), skipped)
    counted = steps[skipped : max(skipped + LEAST_STEPS, len(steps) - recipe.staleness)]
    step_s = statistics.median(row["seconds"] for row in counted)
    scenario = _scenario(recipe, dataflow, spans, counted)
    own = simulate(scenario).step_s
    moves = [_move(what, other, step_s * simulate(other).step_s / own, step_s) for what, other in _others(scenario)]
    return Advice(
        run=folder.name,
        steps=len(counted),
        step_s=step_s,
        simulated_s=own,
        busy=_busy(spans, scenario),
        pool_idle=_idle(spans, scenario),
        batch_wait=statistics.median(row.get("wait.batch_seconds", 0.0) for row in counted) / step_s,
        moves=sorted((move for move in moves if move.gain >= MIN_GAIN), key=lambda move: move.step_s),
    )


def format_advice(advice: Advice) -> str:
    """The advice as text."""
    lines = [
        f"{advice.run}: {advice.step_s:.3g} s a step over {advice.steps} steps "
        f"({advice.simulated_s:.3g} s simulated with its measured speeds)"
    ]
    lines += [f"  {service:<12} busy {share:4.0%}" for service, share in advice.busy.items()]
    lines += [f"  pool {pool:<12} idle {share:4.0%}" for pool, share in advice.pool_idle.items()]
    lines.append(f"  training waited for a batch {advice.batch_wait:.0%} of the time")
    if not advice.moves:
        lines.append(f"no other placement of these services is predicted to save {MIN_GAIN:.0%} of a step")
    for move in advice.moves[:3]:
        lines.append(f"{move.what}: {move.step_s:.3g} s a step predicted, {move.gain:.0%} less")
    return "\n".join(lines)


# --- the measured run


def _steady(spans: list[Span], skipped: int) -> list[Span]:
    """The spans after the last training of the warm-up."""
    since = max((span.end for span in spans if 0 <= span.step < skipped), default=0.0)
    return [span for span in spans if span.start >= since and not is_evaluator(span.service)]


def _scenario(recipe: Recipe, dataflow: Dataflow, spans: list[Span], steps: list[dict[str, Any]]) -> Scenario:
    pools = {s: p for s, p in pools_of(recipe, dataflow).items() if s in {*dataflow.services, GENERATOR}}
    shares = all(recipe.pools[p].device in ("", CPU_SLOT) for p in pools.values() if p)
    cores = float(os.cpu_count() or 1) if shares else 0.0
    tokens = sum(row["tokens_generated"] for row in steps) / max(1, sum(row["samples"] for row in steps))
    whole = recipe.generation.engine == "torch"
    return Scenario(
        dataflow=dataflow,
        services=services_of(recipe, dataflow),
        pools=pools,
        devices={name: pool.devices for name, pool in recipe.pools.items() if name in pools.values()},
        speeds=speeds_of(spans, list(pools), cores, tokens if whole else min(tokens, TURN_TOKENS)),
        pace=msgspec.structs.replace(recipe.pace, steps=WARM_UP + 2 * recipe.staleness + STEADY_STEPS),
        prompt=Lengths.fixed(1),
        response=Lengths.fixed(max(1.0, tokens)),
        firing_rows=recipe.firing_rows,
        mailbox_rows=recipe.mailbox_rows,
        whole_batches=whole,
        cores=cores,
    )


def _busy(spans: list[Span], scenario: Scenario) -> dict[str, float]:
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    return {s: share for s, share in idle_ratios(spans, start, end).busy.items() if s in scenario.pools}


def _idle(spans: list[Span], scenario: Scenario) -> dict[str, float]:
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    idle = {}
    for pool in scenario.devices:
        own = [(span.start, span.end) for span in spans if scenario.pools.get(span.service) == pool]
        idle[pool] = 1 - union_seconds(own) / (end - start)
    return idle


# --- alternatives


def _others(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    """Other groupings of the services in pools on at most as many devices, and one more version of staleness."""
    placed = [service for service, pool in scenario.pools.items() if pool]
    most = sum(scenario.devices.values())
    if all(count == 1 for count in scenario.devices.values()):
        now = {frozenset(s for s in placed if scenario.pools[s] == pool) for pool in scenario.devices}
        for sets in placements((1 << len(placed)) - 1):
            groups = [[s for i, s in enumerate(placed) if mask >> i & 1] for mask in sets]
            if len(groups) <= most and {frozenset(group) for group in groups} != now:
                yield ", ".join("+".join(group) for group in groups), _grouped(scenario, groups)
    older = msgspec.structs.replace(scenario.pace, staleness=scenario.pace.staleness + 1, steps=scenario.pace.steps + 2)
    yield f"staleness {older.staleness}", msgspec.structs.replace(scenario, pace=older)


def _grouped(scenario: Scenario, groups: list[list[str]]) -> Scenario:
    pools = {service: "+".join(group) for group in groups for service in group}
    without_device = {service: "" for service, pool in scenario.pools.items() if not pool}
    devices = {"+".join(group): 1 for group in groups}
    return msgspec.structs.replace(scenario, pools={**pools, **without_device}, devices=devices)


def _move(what: str, other: Scenario, predicted_s: float, measured_s: float) -> Move:
    pools: dict[str, list[str]] = {}
    for service, pool in other.pools.items():
        if pool:
            pools.setdefault(pool, []).append(service)
    return Move(what, pools, predicted_s, 1 - predicted_s / measured_s)
