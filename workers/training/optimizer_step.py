"""AdamW with its learning-rate schedule, and steps that are committed whole or rolled back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from protocols.stage import StepAbandoned
from workers.parallel.model import ParallelModel
from workers.settings import Optimizer
from workers.training.checkpoint import MOMENTS, Counters


class StepRefused(Exception):
    """An update with a loss or gradient that is not finite: weights and optimizer are as they were before it."""


class LrSchedule(NamedTuple):
    """The factor of the peak learning rate: a linear rise over `warmup_steps`, times a decay.

    The decay falls from 1 after optimizer step `first` to `floor` after step `last`.
    """

    warmup_steps: int
    decay: Literal["constant", "linear", "cosine"] = "constant"
    first: int = 0
    last: int = 0
    floor: float = 0.0

    @classmethod
    def of(cls, settings: Optimizer) -> LrSchedule:
        """That of an RL run, which decays from its first step."""
        decay = settings.decay if settings.decay_steps else "constant"
        return cls(settings.warmup_steps, decay, 0, settings.decay_steps, settings.floor)

    def factor(self, update: int) -> float:
        """That of optimizer step `update`, counted from 1."""
        warm = min(1.0, update / self.warmup_steps) if self.warmup_steps else 1.0
        progress = min(max((update - 1 - self.first) / max(self.last - self.first, 1), 0.0), 1.0)
        match self.decay:
            case "constant":
                return warm
            case "linear":
                left = 1.0 - progress
            case "cosine":
                left = 0.5 + 0.5 * math.cos(math.pi * progress)
        return warm * (self.floor + (1.0 - self.floor) * left)


class OptimizerSteps:
    """The optimizer of what a rank trains. Version k means: weights after k committed steps.

    `path` is the transformers folder that the model came from. Without a `schedule` the learning rate follows that of
    `settings`. Raises ValueError for a learning rate of 0 or less.
    """

    def __init__(
        self,
        model: ParallelModel,
        path: str,
        learning_rate: float,
        settings: Optimizer,
        schedule: LrSchedule | None = None,
    ) -> None:
        if learning_rate <= 0:
            raise ValueError(f"model {path}: a trained model needs a learning_rate above 0, got {learning_rate}")
        self.model = model
        self.version = 0
        self._path = path
        self._learning_rate = learning_rate
        self._clip = settings.gradient_clip or math.inf
        self._schedule = schedule or LrSchedule.of(settings)
        self._updates = 0  # optimizer steps taken, for the schedule
        self._abandoned = False
        self.last_rate = 0.0  # learning rate of the last optimizer step
        self._optimizer = torch.optim.AdamW(
            model.optimized.values(),
            lr=learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            foreach=False,
        )

    @contextmanager
    def update(self, optimizer_steps: int) -> Iterator[None]:
        """Context of one committed step: after it the version is one higher.

        If the body raises, weights, optimizer and schedule are bitwise what they were. Several optimizer steps need a
        copy of weights and moments to roll back to, which is held until the last one.
        """
        before = self._copy() if optimizer_steps > 1 else None
        try:
            yield
        except BaseException:
            if before is not None:
                self._go_back(*before)
            raise
        finally:
            # Gradients that a refused micro-batch left behind would be added to the next step's.
            self.model.release_gradient()
        self.version += 1

    def abandon(self) -> None:
        """Any thread: have the current update, and any later one, raise StepAbandoned before its next optimizer step.

        All ranks do so at the same optimizer step, also if only one of them is told.
        """
        self._abandoned = True

    def _end_if_abandoned(self, what: str) -> None:
        if self.model.sum_over_world(float(self._abandoned)):
            raise StepAbandoned(what)

    def _take_step(self, what: str, norm: float) -> None:
        """Step with the gradient that has this global norm. Raises StepRefused, naming `what`, for one not finite."""
        if not math.isfinite(norm):
            raise StepRefused(f"{what}: gradient norm is {norm}; the optimizer step was not taken")
        self._updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * self._schedule.factor(self._updates)
            self.last_rate = group["lr"]
        self._optimizer.step()

    def _restore(self, counters: Counters) -> None:
        """Go to where a checkpoint was taken; a model that goes back to its start has no moments."""
        self.version, self._updates = counters.version, counters.updates
        counters.restore_rng()
        self._optimizer.state.clear()

    def _restore_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        """Give a parameter's optimizer its state."""
        step = torch.tensor(float(self._updates))
        self._optimizer.state[parameter] = {"step": step, **{moment: moments[moment] for moment in MOMENTS}}

    def _copy(self) -> tuple[list[Tensor], dict[str, object], int]:
        return (
            [weight.detach().clone() for weight in self.model.updated],
            copy.deepcopy(self._optimizer.state_dict()),
            self._updates,
        )

    @torch.no_grad()
    def _go_back(self, weights: list[Tensor], optimizer: dict[str, object], updates: int) -> None:
        for weight, before in zip(self.model.updated, weights, strict=True):
            weight.copy_(before)
        self._optimizer.load_state_dict(optimizer)
        self._updates = updates
