"""AdamW with its learning-rate schedule, and steps that are committed whole or rolled back."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workers.settings import Optimizer
from workers.training.checkpoint import MOMENTS, Counters


class StepRefused(Exception):
    """An update with a loss or gradient that is not finite: weights and optimizer are as they were before it."""


class OptimizerSteps(ABC):
    """An optimizer over named parameters. Version k means: weights after k committed steps.

    `path` is the transformers folder that the model came from. Raises ValueError for a learning rate of 0 or less.
    """

    def __init__(
        self, optimized: Mapping[str, nn.Parameter], path: str, learning_rate: float, settings: Optimizer
    ) -> None:
        if learning_rate <= 0:
            raise ValueError(f"model {path}: a trained model needs a learning_rate above 0, got {learning_rate}")
        self.version = 0
        self._path = path
        self._learning_rate = learning_rate
        self._settings = settings
        self._updates = 0  # optimizer steps taken, for the schedule
        self._optimizer = torch.optim.AdamW(
            optimized.values(),
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
            self._release_gradient()
        self.version += 1

    @abstractmethod
    def _weights(self) -> Iterable[Tensor]:
        """What an optimizer step changes."""

    @abstractmethod
    def _release_gradient(self) -> None: ...

    def _take_step(self, what: str, norm: float) -> None:
        """Step with the gradient that has this global norm. Raises StepRefused, naming `what`, for one not finite."""
        if not math.isfinite(norm):
            raise StepRefused(f"{what}: gradient norm is {norm}; the optimizer step was not taken")
        self._updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * lr_factor(self._updates, self._settings)
        self._optimizer.step()

    @property
    def _clip(self) -> float:
        return self._settings.gradient_clip or math.inf

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
            [weight.detach().clone() for weight in self._weights()],
            copy.deepcopy(self._optimizer.state_dict()),
            self._updates,
        )

    @torch.no_grad()
    def _go_back(self, weights: list[Tensor], optimizer: dict[str, object], updates: int) -> None:
        for weight, before in zip(self._weights(), weights, strict=True):
            weight.copy_(before)
        self._optimizer.load_state_dict(optimizer)
        self._updates = updates


def lr_factor(update: int, settings: Optimizer) -> float:
    """Share of the learning rate that optimizer step `update`, counted from 1, takes: warm-up, then linear decay."""
    warm = min(1.0, update / settings.warmup_steps) if settings.warmup_steps else 1.0
    left = max(0.0, 1.0 - (update - 1) / settings.decay_steps) if settings.decay_steps else 1.0
    return warm * left
