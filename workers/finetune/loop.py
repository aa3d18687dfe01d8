"""The training loop shared by SFT, reward and cost models, on the model and optimizer steps that RL training has.

All randomness comes from the schedule's seed, and a loss is divided by the whole batch's denominator before it is
summed over micro-batches. So a result does not depend on how a batch is split, except with dropout: its masks
have the shapes of the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from workers.data.token_rows import TokenRows
from workers.finetune.dropout import dropout_by_seed
from workers.finetune.output import Output
from workers.finetune.settings import FineTuning, Schedule
from workers.parallel.backends import trained_model
from workers.parallel.model import MicroLoss
from workers.parallel.plan import Head
from workers.parallel.process_group import own_device
from workers.parallel.sharding import Sharding
from workers.settings import Model
from workers.training.optimizer_step import LrSchedule
from workers.training.trainable import TrainableModel

OnStep = Callable[[int, float], object]
OnWarning = Callable[[str], object]
Evaluate = Callable[[], dict[str, float]]  # held-out values by name
RowsLoss = Callable[[npt.NDArray[np.int64]], MicroLoss]  # the loss of a batch of these rows


class Curve(NamedTuple):
    """How a training went."""

    losses: list[float]  # of each step
    heldout: dict[str, float]  # what `evaluate` found after the last step; empty without held-out rows


def load_trainable(settings: FineTuning, head: Head) -> TrainableModel:
    """The model to start from and its optimizer: on the GPU, where there is one."""
    one_device = Sharding(device=own_device(0), recompute=settings.recompute)
    schedule, warmup_steps = settings.schedule, settings.optimizer.warmup_steps
    base = Model(
        path=settings.model,
        dtype=settings.dtype,
        lora=settings.lora,
        attention=settings.attention,
        head_chunk=settings.head_chunk,
    )
    model = trained_model(base, one_device, head=head, seed=schedule.seed)
    rates = LrSchedule(warmup_steps, schedule.decay, warmup_steps, schedule.steps, settings.optimizer.floor)
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
    output: Output,
    *,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    on_step: OnStep | None = None,
    together: int = 1,
    dropout: bool = False,
) -> Curve:
    """Train; all that is measured goes into the output's journal.

    A batch has `batch_size` examples of `together` successive rows each, which a loss sees at once. `evaluate` measures
    held-out rows before the first step, every `evaluate_every` steps, and after the last. `on_step(step, loss)` is
    called after every step, from 0. With `dropout` the steps have the model's own, whose masks the schedule's seed and
    the step decide; `evaluate` never has any. Raises StepRefused if a loss or the gradient's norm is not finite; the
    weights are then those of the previous step.
    """
    step_losses: list[float] = []
    heldout: dict[str, float] = {}
    if evaluate is not None:
        output.metrics(0, evaluate())
    for step, examples in enumerate(batches(len(data) // together, schedule)):
        rows = (examples[:, None] * together + np.arange(together)).ravel()
        what = f"step {step} at a learning rate of up to {schedule.learning_rate}"
        dropped = dropout_by_seed(trained.model, schedule.seed, step) if dropout else nullcontext()
        with trained.update(1), dropped:
            taken = trained.step(what, data.take(rows), schedule.tokens_per_micro_batch, batch_loss(rows), together)
        step_losses.append(taken["loss"])
        done = step + 1
        due = done == schedule.steps or (evaluate_every and not done % evaluate_every)
        heldout = evaluate() if evaluate is not None and due else {}
        measured = {"loss": taken["loss"], "gradient_norm": taken["gradient_norm"], "learning_rate": trained.last_rate}
        output.metrics(done, measured | heldout)
        if on_step:
            on_step(step, taken["loss"])
    return Curve(step_losses, heldout)
