"""Measure the speed of a recipe's services alone and concurrently, in threads or processes as in its runtime.

The number of cores does not predict the aggregate speed: services share memory bandwidth and caches, and in one
process the interpreter and the heap. Each service with a model repeats its call of a step, first alone, then
together with the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import msgspec

from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.dataflow.graph import Dataflow
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import trace
from asyncflow.planner.calibration.calibration import Timed
from asyncflow.planner.calibration.machine import CalibrationSizes, rate
from asyncflow.planner.calibration.worker_harness import WorkerHarness, forward_calls, update_calls
from asyncflow.recipe.config import Recipe

READY, RATE, CALLS = "ready:", "rate:", "calls:"  # requests to a worker process, and prefixes of its answers
MOST_ROWS = 256  # of the data, for each worker process
LIFETIME_S = 300.0  # of a worker process; then it is killed


class RecipeTimings(msgspec.Struct, frozen=True):
    """The aggregate speed of a recipe's services, and the policy's calls."""

    cores: float  # aggregate speed-up with one busy service per core
    crowded: float  # aggregate speed-up with all services busy; 0: there are no more services than cores
    forward: list[Timed]  # the policy's, alone
    update: list[Timed]


def in_threads(harness: WorkerHarness, tokens: int) -> RecipeTimings:
    """Measure services in one process."""
    forward, update = forward_calls(harness, tokens), update_calls(harness, tokens)
    works = [service_call(harness, name, tokens) for name in computing(harness.recipe, harness.dataflow)]
    alone = [rate(work, harness.sizes.seconds) for work in works]

    def together(count: int) -> list[float]:
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(lambda work: rate(work, harness.sizes.seconds), works[:count]))

    return RecipeTimings(*_speed_ups(alone, together), forward, update)


def in_processes(harness: WorkerHarness, tokens: int) -> RecipeTimings:
    """Measure services in one process each. Cores beyond the number of services are assumed to scale alike."""
    names, cores = computing(harness.recipe, harness.dataflow), os.cpu_count() or 1
    rows = harness.source.rows[:MOST_ROWS]
    processes = [_WorkerProcess(_WorkerTask(harness.recipe, rows, name, tokens, harness.sizes)) for name in names]

    def together(count: int) -> list[float]:
        for process in processes[:count]:
            process.send(RATE)
        return [float(process.wait_for(RATE)) for process in processes[:count]]

    try:
        for process in processes:
            process.wait_for(READY)
        forward, update = msgspec.json.decode(processes[0].request(CALLS), type=tuple[list[Timed], list[Timed]])
        speed_up, crowded = _speed_ups([float(process.request(RATE)) for process in processes], together)
    finally:
        for process in processes:
            process.close()
    return RecipeTimings(max(speed_up, speed_up * cores / len(processes)), crowded, forward, update)


def computing(recipe: Recipe, dataflow: Dataflow) -> list[str]:
    """Services with a model: first the policy, then other trained ones, then those that only infer."""
    trained = {stage.service for stage in dataflow.sinks}
    own = [service for service in dataflow.services if service in recipe.models and recipe.models[service].path]
    return sorted(own, key=lambda service: (service != "policy", service not in trained))


def service_call(harness: WorkerHarness, service: str, tokens: int) -> Callable[[], object]:
    """A call of a service on rows of `tokens` tokens: an update if it trains."""
    rows = harness.sizes.contention_rows
    stages = [stage for stage in harness.dataflow.stages_of(service) if not stage.generates]
    stage = next((stage for stage in stages if stage.is_sink), stages[0])
    work = harness.loaded[service].method(stage.method)
    return partial(work, harness.experience(rows, tokens) if stage.is_sink else harness.rollouts(rows, tokens))


def _speed_ups(alone: list[float], together: Callable[[int], list[float]]) -> tuple[float, float]:
    """Aggregate speed-up with one busy service per core, and with all busy (0 if there are no more than cores)."""
    cores = min(len(alone), os.cpu_count() or 1)
    speed_up, crowded = (
        max(1.0, sum(both / one for both, one in zip(together(count), alone, strict=False)))
        for count in (cores, len(alone))
    )
    return speed_up, min(speed_up, crowded) if len(alone) > cores else 0.0


# --- one service in its own process


class _WorkerTask(msgspec.Struct, frozen=True):
    """The work of a worker process."""

    recipe: Recipe
    rows: list[DataRow]  # of the recipe's data
    service: str
    tokens: int
    sizes: CalibrationSizes


class _WorkerProcess:
    """A process with one service's worker, which measures on request."""

    def __init__(self, task: _WorkerTask) -> None:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._deadline = threading.Timer(LIFETIME_S, self._process.kill)
        self._deadline.start()
        self.send(msgspec.json.encode(task).decode())

    def request(self, what: str) -> str:
        self.send(what)
        return self.wait_for(what)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_for(self, prefix: str) -> str:
        """The rest of the next line that starts with `prefix`. Raises RuntimeError if the process exits before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(prefix):
                return line.removeprefix(prefix)
        raise RuntimeError(
            f"a calibration process exited with code {self._process.wait()} before it answered {prefix!r}"
        )

    def close(self) -> None:
        self._deadline.cancel()
        self._process.kill()
        self._process.communicate()


def _serve() -> None:
    """In the worker process: build the worker, then measure once for each line of input."""
    task = msgspec.json.decode(sys.stdin.readline(), type=_WorkerTask)
    recipe, tokens = task.recipe, task.tokens
    source = PromptSource(task.rows, recipe.models["policy"].path, recipe.seed)
    dataflow = trace(algorithm_named(recipe.algorithm))
    with closing(WorkerHarness(recipe, dataflow, source, task.sizes, {task.service})) as harness:
        work = service_call(harness, task.service, tokens)
        _answer(READY, "")
        for line in sys.stdin:
            if line.strip() == RATE:
                _answer(RATE, str(rate(work, task.sizes.seconds)))
            else:
                calls = forward_calls(harness, tokens), update_calls(harness, tokens)
                _answer(CALLS, msgspec.json.encode(calls).decode())


def _answer(what: str, answer: str) -> None:
    sys.stdout.write(f"{what}{answer}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
