"""Measure a machine and a runtime, independent of the model: products, copies, calls, records. In median seconds."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from asyncflow.control.admission.prompts import PromptSource
from asyncflow.control.store.ledger import Ledger, State
from asyncflow.recipe.config import Recipe
from asyncflow.services.channels.endpoint import Endpoint, Store, ask
from asyncflow.services.channels.shard_refs import pack
from asyncflow.services.ranks.spec import CustomSettings, Limits, ServiceSpec
from asyncflow.services.runtime import Runtime
from protocols.control.requests import Invoke
from protocols.data.ids import sample_id
from protocols.data.messages import Prompts, Scores
from protocols.stage import stage

MATRIX = 768  # rows and columns of the product that measures peak flops
COPIED_BYTES = 64 << 20
STATES: tuple[State, ...] = ("generated", "scored", "batched")


class CalibrationSizes(msgspec.Struct, frozen=True):
    """The sizes of the measurements."""

    rows: tuple[int, ...] = (1, 8, 32, 128)  # of a forward pass
    trained_rows: tuple[int, ...] = (4, 16, 48, 128)  # of an optimizer step
    contention_rows: int = 48  # of calls of concurrent services
    running: tuple[int, ...] = (1, 4, 16, 64)  # sequences that are generated together
    rounds: int = 5
    calls: int = 40
    seconds: float = 2.0  # of repeated calls alone, and of concurrent calls


QUICK = CalibrationSizes(
    rows=(1, 16), trained_rows=(4, 16), contention_rows=8, running=(1, 16), rounds=2, calls=8, seconds=0.2
)


def peak_flops(sizes: CalibrationSizes) -> float:
    """Flops per second of one large product, on the number of threads that torch uses."""
    import torch

    a = torch.randn(MATRIX, MATRIX)
    return 2 * MATRIX**3 / median_s(lambda: a @ a, 4 * sizes.rounds)


def bandwidth(sizes: CalibrationSizes) -> float:
    """Bytes per second read and written by a copy."""
    source = np.ones(COPIED_BYTES, np.uint8)
    target = np.empty_like(source)
    return 2 * COPIED_BYTES / median_s(lambda: np.copyto(target, source), sizes.rounds)


async def call_s(runtime: Runtime, recipe: Recipe, source: PromptSource, sizes: CalibrationSizes) -> float:
    """Seconds of a call to a service that does nothing with its rows."""
    spec = ServiceSpec(
        name="echo",
        settings=CustomSettings(f"{__name__}:EchoScores"),
        limits=Limits(mailbox_rows=64, firing_rows=64, inline_bytes=recipe.inline_bytes),
        run=f"calibration-{os.getpid()}",
    )
    try:
        started = await runtime.start([spec])
        rows = source.requests([source.at(position) for position in range(16)], 1, 0)
        return await _median_call_s(started["echo"].endpoint, runtime.store, rows, sizes.calls)
    finally:
        await runtime.stop()


async def _median_call_s(endpoint: Endpoint, store: Store, rows: Prompts, calls: int) -> float:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        part = pack(store, rows, 0)
        await ask(endpoint, Invoke("score", [part.shard]), [part.payload])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class EchoScores:
    """Scores every row 0 immediately, so that only the overhead of the call is measured."""

    def __init__(self, spec: ServiceSpec, rank: int) -> None:
        """The arguments are those of every custom worker; none is used."""

    @stage(protocol="DP_PROTO")
    def score(self, prompts: Prompts) -> Scores:
        """0 for each row."""
        return Scores(sample_ids=prompts.sample_ids, scores=np.zeros(len(prompts), np.float32))


def record_s(recipe: Recipe, sizes: CalibrationSizes) -> float:
    """Seconds of a step's ledger transactions, in the folder of the recipe's runs."""
    root = Path(recipe.folder)
    root.mkdir(parents=True, exist_ok=True)
    seconds = []
    with tempfile.TemporaryDirectory(dir=root, prefix=".calibration-") as folder:
        ledger = Ledger(Path(folder) / "ledger.db")
        for step in range(sizes.rounds):
            samples = [sample_id(step * recipe.samples_per_step + i, 0) for i in range(recipe.samples_per_step)]
            start = time.perf_counter()
            ledger.admit(samples, step, 0, 0)
            for state in STATES:
                ledger.move(samples, state)
            ledger.commit_step(step, 0, samples)
            seconds.append(time.perf_counter() - start)
        ledger.close()
    return statistics.median(seconds)


def rate(work: Callable[[], object], seconds: float) -> float:
    """Calls per second, after one that warms up."""
    work()
    start, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < start + seconds:
        work()
        count += 1
    return count / (now - start)


def median_s(work: Callable[[], object], rounds: int) -> float:
    """The median seconds of several calls, after one that warms up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
