"""What most tests of whole runs do: run a recipe to its end, and read the metrics and weights that it left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import asyncflow
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe
from tests.workers.checkpoints import trained_weights

ASYNCFLOW = [sys.executable, "-m", "asyncflow.cli.main"]
START_SECONDS = 180.0  # includes the imports of a new process on a busy machine

Weights = dict[str, torch.Tensor]


async def finished(recipe: Recipe, folder: Path | None = None) -> Path:
    """Run a recipe to its last step, and return the run's folder."""
    async with asyncflow.launch(recipe, folder=folder) as run:
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    return run.folder


def weights(folder: Path, step: int, role: str = "policy") -> Weights:
    """A role's weights in the checkpoint of a step."""
    return trained_weights(folder / "checkpoints" / f"step_{step:06d}" / role)


def differing(ours: Weights, theirs: Weights) -> list[str]:
    """Names of the tensors of `ours` that differ from `theirs` in any bit."""
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def metric(folder: Path, name: str) -> list[float]:
    """A metric of every step, in order."""
    return [line[name] for line in read_lines(folder / "metrics.jsonl")]


def run_and_kill(recipe: Path, folder: Path, steps: int) -> None:
    """Run a recipe's file from the command line, and kill its process group after `steps` committed steps."""
    command = [*ASYNCFLOW, "run", str(recipe), "--folder", str(folder)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while len(read_lines(folder / "metrics.jsonl")) < steps:
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.monotonic() < deadline, f"step {steps} was not reached within {START_SECONDS:g} s"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "policy").exists(), "it finished before it was killed"
