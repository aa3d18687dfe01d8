"""`asyncflow calibrate`: time the recipe's own workers on this machine at a few sizes; takes about half a minute.

    matrix products, memory    peak flops and bandwidth
    forward, update, decode    the share that the recipe's model reaches, and fixed overheads
    copies of the weights      publishing one, loading one
    concurrent services        aggregate speed with shared cores, and a shared interpreter in one process
    a call, a record           a call to a service of the recipe's runtime; a step in the ledger

The times are medians, to ignore short disturbances. The workers contain no code for measuring.
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
from asyncflow.planner.calibration.calibration import Calibration, ModelTimings, efficiency_of, fit
from asyncflow.planner.calibration.contention import in_processes, in_threads
from asyncflow.planner.calibration.machine import CalibrationSizes, median_s
from asyncflow.planner.calibration.worker_harness import WorkerHarness, message_of
from asyncflow.planner.costs.devices import Device
from asyncflow.planner.costs.workload import Lengths
from asyncflow.planner.simulation.scenarios import shapes_of
from asyncflow.recipe.config import Recipe
from asyncflow.recipe.service_specs import GENERATOR
from asyncflow.services.runtime import CPU_SLOT, SLOTS_PER_CORE, Runtime
from protocols.weights import Version
from workers.generation.packed import received


async def measure(
    recipe: Recipe, dataflow: Dataflow, source: PromptSource, runtime: Runtime, sizes: CalibrationSizes
) -> Calibration:
    """Calibrate with a recipe's models; `runtime` is of the recipe's kind and not started."""
    call_s = await machine.call_s(runtime, recipe, source, sizes)
    return await asyncio.to_thread(_measure, recipe, dataflow, source, call_s, sizes)


def _measure(
    recipe: Recipe, dataflow: Dataflow, source: PromptSource, call_s: float, sizes: CalibrationSizes
) -> Calibration:
    with closing(WorkerHarness(recipe, dataflow, source, sizes)) as harness:
        peak, bandwidth = machine.peak_flops(sizes), machine.bandwidth(sizes)
        generations = [_generate(harness, rows) for rows in sizes.running for _ in range(2)]
        responses = Lengths.measured([length for one in generations for length in one.lengths])
        tokens = round(responses.mean)
        own = in_threads(harness, tokens) if recipe.runtime == "local" else in_processes(harness, tokens)
        timings = ModelTimings(
            shape=shapes_of(recipe)["policy"],
            sample_tokens=float(harness.rollouts(max(sizes.rows), tokens).token_counts.mean()),
            steps=recipe.loss.epochs * recipe.loss.mini_batches,
            peak_flops=peak,
            bandwidth=bandwidth,
            forward=own.forward,
            update=own.update,
            decode=fit([g.tokens / g.steps for g in generations], [g.seconds / g.steps for g in generations]),
            publish_s=_publish_s(harness),
        )
        efficiency = efficiency_of(timings)
        rows = _without_models(harness, tokens)
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
    """The lengths of sequences that were generated together, and the seconds."""

    lengths: list[int]
    seconds: float

    @property
    def steps(self) -> int:
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def _generate(harness: WorkerHarness, rows: int) -> TimedGeneration:
    engine = harness.engine
    sampling = harness.recipe.generation.sampling
    start, finished = time.perf_counter(), []
    engine.submit(harness.prompts(rows), sampling)
    while engine.unfinished:
        finished += engine.step()
    return TimedGeneration([len(row.tokens) for row in finished], time.perf_counter() - start)


def _publish_s(harness: WorkerHarness) -> float:
    """Seconds to publish or to load a copy of the weights: the mean of both. 0 if the policy generates itself."""
    if GENERATOR not in harness.loaded:
        return 0.0
    policy, engine = harness.loaded["policy"].worker, harness.engine
    publish, load = [], []
    for step in range(1, harness.sizes.rounds + 1):
        start = time.perf_counter()
        manifest, buffer = policy.snapshot(Version(1, step))
        middle = time.perf_counter()
        engine.load(received(manifest, buffer, harness.recipe.models["policy"]))
        publish.append(middle - start)
        load.append(time.perf_counter() - middle)
    return (statistics.median(publish) + statistics.median(load)) / 2


def _without_models(harness: WorkerHarness, tokens: int) -> dict[str, float]:
    """Seconds per row of rules and of the advantage function."""
    rows = max(harness.sizes.trained_rows)
    rollouts = harness.rollouts(rows, tokens)
    found = {}
    for name, model in harness.recipe.models.items():
        if model.rule and name in harness.loaded:
            found[name] = median_s(partial(harness.loaded[name].worker.score, rollouts), harness.sizes.rounds) / rows
    closing_stage = harness.dataflow.batch_stage
    inputs = [message_of(channel.message, rollouts) for channel in harness.dataflow.inputs_of(closing_stage.name)]
    function = harness.loaded[ADVANTAGE].method(closing_stage.method)
    found[ADVANTAGE] = median_s(partial(function, *inputs), harness.sizes.rounds) / rows
    return found
