"""`asyncflow calibrate`: half a minute of the recipe's own workers, at a few sizes each, on what is here.

    matrix products, memory    what the processor could do
    forward, update, decode    what the recipe's model gets of it, and what every call costs beside
    copies of the weights      taking one, installing one
    two at a time              how much work is done at once: cores, and the interpreter where they share one
    a call, a record           rows through a service of the recipe's runtime; a step in the ledger

Medians, so that a moment's disturbance does not count. Everything is measured from outside the workers' classes.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import time
from contextlib import closing
from functools import partial

import msgspec

from asyncflow.control.admission.prompts import PromptSource
from asyncflow.dataflow.graph import ADVANTAGE, Dataflow
from asyncflow.planner.calibration import machine
from asyncflow.planner.calibration.calibration import Calibration, ModelTimings, efficiency_of, fit_decode
from asyncflow.planner.calibration.contention import in_processes, in_threads
from asyncflow.planner.calibration.machine import CalibrationSizes, median_s
from asyncflow.planner.calibration.worker_harness import WorkerHarness, message_of
from asyncflow.planner.costs.devices import Device
from asyncflow.planner.costs.workload import Lengths
from asyncflow.planner.simulation.scenarios import shapes_of
from asyncflow.recipe.config import Recipe
from asyncflow.recipe.service_specs import GENERATOR
from asyncflow.services.runtime import CPU_SLOT, SLOTS_PER_CORE, Runtime
from protocols.roles import Sampling
from protocols.weights import Version
from workers.generation.packed import received


async def measure(
    recipe: Recipe, dataflow: Dataflow, source: PromptSource, runtime: Runtime, sizes: CalibrationSizes
) -> Calibration:
    """Calibrate on a recipe's models; `runtime` is one of the recipe's kind that has not been started."""
    call_s = await machine.call_s(runtime, recipe, source, sizes)
    return await asyncio.to_thread(_measure, recipe, dataflow, source, call_s, sizes)


def _measure(
    recipe: Recipe, dataflow: Dataflow, source: PromptSource, call_s: float, sizes: CalibrationSizes
) -> Calibration:
    with closing(WorkerHarness(recipe, dataflow, source, sizes)) as bench:
        peak, bandwidth = machine.peak_flops(sizes), machine.bandwidth(sizes)
        drawn = [_generate(bench, rows) for rows in sizes.running for _ in range(2)]
        responses = Lengths.measured([length for draw in drawn for length in draw.lengths])
        tokens = round(responses.mean)
        own = in_threads(bench, tokens) if recipe.runtime == "local" else in_processes(bench, tokens)
        figures = ModelTimings(
            shape=shapes_of(recipe)["policy"],
            sample_tokens=float(bench.rollouts(max(sizes.rows), tokens).token_counts.mean()),
            steps=recipe.loss.epochs * recipe.loss.mini_batches,
            peak_flops=peak,
            bandwidth=bandwidth,
            forward=own.forward,
            update=own.update,
            decode=fit_decode([(draw.tokens / draw.steps, draw.seconds / draw.steps) for draw in drawn]),
            publish_s=_publish_s(bench),
        )
        efficiency = efficiency_of(figures)
        rows = _without_models(bench, tokens)
        record = machine.record_s(recipe, sizes)
    slots = os.cpu_count() or 1
    device = Device(
        name=CPU_SLOT,
        peak_flops=peak,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / slots,
        memory_bytes_per_s=bandwidth,
        link_bytes_per_s=bandwidth,
        network_bytes_per_s=bandwidth,
        devices_per_node=slots * SLOTS_PER_CORE,
        efficiency=msgspec.structs.replace(efficiency, call_s=call_s, record_s=record),
        cores=own.cores,
        crowded=own.crowded,
    )
    where = f"{recipe.name} on {slots} cores of {platform.machine()}, runtime {recipe.runtime}"
    return Calibration(device, responses, recipe.generation.max_tokens, rows, where)


# --- the recipe's models


class TimedGeneration(msgspec.Struct, frozen=True):
    """Sequences that were drawn together."""

    lengths: list[int]
    seconds: float

    @property
    def steps(self) -> int:
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def _generate(bench: WorkerHarness, rows: int) -> TimedGeneration:
    engine = bench.engine
    sampling = Sampling(max_tokens=bench.recipe.generation.max_tokens, temperature=bench.recipe.generation.temperature)
    start, finished = time.perf_counter(), []
    engine.submit(bench.prompts(rows), sampling)
    while engine.unfinished:
        finished += engine.step()
    return TimedGeneration([len(row.tokens) for row in finished], time.perf_counter() - start)


def _publish_s(bench: WorkerHarness) -> float:
    """A copy of the weights, taken or installed: the mean of the two. 0 where the policy generates itself."""
    if GENERATOR not in bench.places:
        return 0.0
    policy, engine = bench.places["policy"].worker, bench.engine
    taken, installed = [], []
    for step in range(1, bench.sizes.rounds + 1):
        start = time.perf_counter()
        manifest, buffer = policy.snapshot(Version(1, step))
        middle = time.perf_counter()
        engine.load(received(manifest, buffer, bench.recipe.models["policy"]))
        taken.append(middle - start)
        installed.append(time.perf_counter() - middle)
    return (statistics.median(taken) + statistics.median(installed)) / 2


def _without_models(bench: WorkerHarness, tokens: int) -> dict[str, float]:
    """Seconds a row of rules, and of the batch function."""
    rows = max(bench.sizes.trained_rows)
    rollouts = bench.rollouts(rows, tokens)
    found = {}
    for name in ("reward", "cost"):
        if name in bench.places and bench.recipe.models[name].rule:
            found[name] = median_s(partial(bench.places[name].worker.score, rollouts), bench.sizes.rounds) / rows
    closing_stage = bench.dataflow.batch_stage
    inputs = [message_of(channel.message, rollouts) for channel in bench.dataflow.inputs_of(closing_stage.name)]
    function = bench.places[ADVANTAGE].method(closing_stage.method)
    found[ADVANTAGE] = median_s(partial(function, *inputs), bench.sizes.rounds) / rows
    return found
