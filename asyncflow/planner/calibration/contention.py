"""What a recipe's services do alone and side by side, in threads or in processes as its runtime has them.

How many cores there are is no guide to how much is done at once: services share memory and caches, and in one process
the interpreter and the heap. Each service with a model does over and over what it does in a step, first alone, then
beside the others.
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

READY, RATE, CALLS = "ready:", "rate:", "calls:"  # what a child is asked; its answer's line, among others, begins so
MOST_ROWS = 256  # of the data that a child is given
PATIENCE_S = 300.0  # with a child, from its start to its end


class RecipeTimings(msgspec.Struct, frozen=True):
    """A recipe's own work."""

    cores: float  # how many times one service's work is done by as many services as there are cores
    crowded: float  # and by all of them
    forward: list[Timed]  # the policy's, alone
    update: list[Timed]


def in_threads(bench: WorkerHarness, tokens: int) -> RecipeTimings:
    """Of services in one process."""
    forward, update = forward_calls(bench, tokens), update_calls(bench, tokens)
    works = [work_of(bench, name, tokens) for name in computing(bench.recipe, bench.dataflow)]
    alone = [rate(work, bench.sizes.seconds) for work in works]

    def together(count: int) -> list[float]:
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(lambda work: rate(work, bench.sizes.seconds), works[:count]))

    return RecipeTimings(*_at_once(alone, together), forward, update)


def in_processes(bench: WorkerHarness, tokens: int) -> RecipeTimings:
    """Of services in a process each; cores beyond the number of services are taken to be as good."""
    names, cores = computing(bench.recipe, bench.dataflow), os.cpu_count() or 1
    rows = bench.source.rows[:MOST_ROWS]
    children = [_Child(_ChildTask(bench.recipe, rows, name, tokens, bench.sizes)) for name in names]

    def together(count: int) -> list[float]:
        for child in children[:count]:
            child.say(RATE)
        return [float(child.wait_for(RATE)) for child in children[:count]]

    try:
        for child in children:
            child.wait_for(READY)
        forward, update = msgspec.json.decode(children[0].ask(CALLS), type=tuple[list[Timed], list[Timed]])
        at_once, crowded = _at_once([float(child.ask(RATE)) for child in children], together)
    finally:
        for child in children:
            child.close()
    return RecipeTimings(max(at_once, at_once * cores / len(children)), crowded, forward, update)


def computing(recipe: Recipe, dataflow: Dataflow) -> list[str]:
    """Services with a model of their own: the policy, others that train, and then who infers."""
    trained = {stage.service for stage in dataflow.sinks}
    own = [service for service in dataflow.services if service in recipe.models and recipe.models[service].path]
    return sorted(own, key=lambda service: (service != "policy", service not in trained))


def work_of(bench: WorkerHarness, service: str, tokens: int) -> Callable[[], object]:
    """A call of a service over rows of so many tokens: an update where it trains."""
    rows = bench.sizes.contention_rows
    stages = [stage for stage in bench.dataflow.stages_of(service) if not stage.generates]
    stage = next((stage for stage in stages if stage.is_sink), stages[0])
    work = bench.places[service].method(stage.method)
    return partial(work, bench.experience(rows, tokens) if stage.is_sink else bench.rollouts(rows, tokens))


def _at_once(alone: list[float], together: Callable[[int], list[float]]) -> tuple[float, float]:
    """How much is done at once by as many as there are cores, and by all, where those are more (else 0)."""
    cores = min(len(alone), os.cpu_count() or 1)
    at_once, crowded = (
        max(1.0, sum(both / one for both, one in zip(together(count), alone, strict=False)))
        for count in (cores, len(alone))
    )
    return at_once, min(at_once, crowded) if len(alone) > cores else 0.0


# --- a service in a process of its own


class _ChildTask(msgspec.Struct, frozen=True):
    """What a child is to do."""

    recipe: Recipe
    rows: list[DataRow]  # of its data
    service: str
    tokens: int
    sizes: CalibrationSizes


class _Child:
    """A process with one service's worker, that works when it is told to."""

    def __init__(self, task: _ChildTask) -> None:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._deadline = threading.Timer(PATIENCE_S, self._process.kill)
        self._deadline.start()
        self.say(msgspec.json.encode(task).decode())

    def ask(self, what: str) -> str:
        self.say(what)
        return self.wait_for(what)

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_for(self, prefix: str) -> str:
        """The rest of the next line that begins so. Raises RuntimeError where the process has ended instead."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(prefix):
                return line.removeprefix(prefix)
        raise RuntimeError(f"a calibration's process ended with {self._process.wait()} before it said {prefix!r}")

    def close(self) -> None:
        self._deadline.cancel()
        self._process.kill()
        self._process.communicate()


def _work() -> None:
    """The child: be built, then measure once for every line."""
    task = msgspec.json.decode(sys.stdin.readline(), type=_ChildTask)
    recipe, tokens = task.recipe, task.tokens
    source = PromptSource(task.rows, recipe.models["policy"].path, recipe.seed)
    dataflow = trace(algorithm_named(recipe.algorithm))
    with closing(WorkerHarness(recipe, dataflow, source, task.sizes, {task.service})) as bench:
        work = work_of(bench, task.service, tokens)
        _tell(READY, "")
        for line in sys.stdin:
            if line.strip() == RATE:
                _tell(RATE, str(rate(work, task.sizes.seconds)))
            else:
                calls = forward_calls(bench, tokens), update_calls(bench, tokens)
                _tell(CALLS, msgspec.json.encode(calls).decode())


def _tell(what: str, answer: str) -> None:
    sys.stdout.write(f"{what}{answer}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _work()
