"""The training loop shared by SFT, reward and cost models, on the model and optimizer steps that RL training has.

All randomness comes from the schedule's seed, and a loss is divided by the whole batch's denominator before it is
summed over micro-batches. So a result does not depend on how a batch is split.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workers.data.hf_folder import add_end_token
from workers.data.token_rows import TokenRows
from workers.finetune.settings import FineTuning, Schedule
from workers.parallel.backends import trained_model
from workers.parallel.model import MicroLoss
from workers.parallel.plan import Head
from workers.parallel.process_group import own_device
from workers.parallel.sharding import Sharding
from workers.settings import Model
from workers.training.optimizer_step import LrSchedule
from workers.training.trainable import TrainableModel

RESULTS = "training.json"

OnStep = Callable[[int, float], object]
OnWarning = Callable[[str], object]
RowsLoss = Callable[[npt.NDArray[np.int64]], MicroLoss]  # the loss of a batch of these rows


def load_trainable(settings: FineTuning, head: Head) -> TrainableModel:
    """The model to start from and its optimizer: on the GPU, where there is one."""
    one_device = Sharding(device=own_device(0))
    schedule, warmup_steps = settings.schedule, settings.optimizer.warmup_steps
    model = trained_model(Model(path=settings.model, dtype=settings.dtype), one_device, head=head, seed=schedule.seed)
    rates = LrSchedule(warmup_steps, schedule.decay, warmup_steps, schedule.steps)
    return TrainableModel(model, settings.model, schedule.learning_rate, settings.optimizer, rates)


def batches(rows: int, schedule: Schedule) -> Iterator[npt.NDArray[np.int64]]:
    """Row indices of each step, int64 [batch_size]: every epoch is a new permutation of the rows."""
    rng = np.random.Generator(np.random.PCG64(schedule.seed))
    waiting = np.empty(0, np.int64)
    for _ in range(schedule.steps):
        while len(waiting) < schedule.batch_size:
            waiting = np.concatenate([waiting, rng.permutation(rows)])
        yield waiting[: schedule.batch_size]
        waiting = waiting[schedule.batch_size :]


def optimize(
    trained: TrainableModel,
    data: TokenRows,
    schedule: Schedule,
    batch_loss: RowsLoss,
    on_step: OnStep | None,
    together: int = 1,
) -> list[float]:
    """Train and return the loss of each step. `on_step(step, loss)` is called after every step, from 0.

    A batch has `batch_size` examples of `together` successive rows each, which a loss sees at once. Raises StepRefused
    if a loss or the gradient's norm is not finite; the weights are then those of the previous step.
    """
    step_losses: list[float] = []
    for step, examples in enumerate(batches(len(data) // together, schedule)):
        rows = (examples[:, None] * together + np.arange(together)).ravel()
        what = f"step {step} at a learning rate of up to {schedule.learning_rate}"
        with trained.update(1):
            taken = trained.step(what, data.take(rows), schedule.tokens_per_micro_batch, batch_loss(rows), together)
        step_losses.append(taken["loss"])
        if on_step:
            on_step(step, taken["loss"])
    return step_losses


def refuse_existing(output: str | Path) -> None:
    """Raise FileExistsError if the output folder exists: a finished model is never overwritten."""
    if Path(output).exists():
        raise FileExistsError(f"{output} exists already: remove it, or name another output")


def save_folder(
    output: str | Path, trained: TrainableModel, results: Mapping[str, float], end_token: int | None = None
) -> None:
    """Write a transformers folder under a temporary name, then rename it: a folder that exists is complete.

    The tokenizer's files are copies of the ones that it started from. `results` are the training's metrics, written
    beside the weights as training.json. `end_token` is one that the model has learned to end a response with: its
    generation_config.json names it from now on.
    """
    target = Path(output)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    trained.export(str(partial))
    if end_token is not None:
        add_end_token(partial, end_token)
    (partial / RESULTS).write_text(json.dumps(results, indent=2))
    partial.rename(target)
