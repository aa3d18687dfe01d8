"""The critic: predicts the return before each response token and is fitted to what came."""

from __future__ import annotations

import numpy as np
import torch
from msgspec.structs import replace

from protocols.data.messages import Experience, Metrics, Rollouts, Values
from protocols.roles import Critic
from protocols.stage import stage
from workers.losses.aggregation import counts_of, reduce_loss, token_weights
from workers.losses.metrics import STEPS, accumulate, mean_metrics
from workers.losses.value import value_loss
from workers.settings import Loss, Model, Optimizer
from workers.training.models import load_critic, micro_batches, per_response, token_values
from workers.training.optimizer_step import StepRefused
from workers.training.trainable import TrainedModel, mini_batches, named_rows


class CriticWorker(Critic):
    """One rank of a critic."""

    def __init__(self, model: Model, loss: Loss, optimizer: Optimizer, seed: int) -> None:
        self.trained = TrainedModel(load_critic(model.path, model.dtype), model.path, model.learning_rate, optimizer)
        self._loss = loss
        self._seed = seed

    @stage(protocol="3D_PROTO")
    def values(self, rollouts: Rollouts) -> Values:
        """Values under the current weights; each row carries their version."""
        budget = self._loss.tokens_per_micro_batch
        return Values(
            sample_ids=rollouts.sample_ids,
            values=per_response(rollouts, budget, lambda b: token_values(self.trained.model, b)),
            versions=np.full(len(rollouts), self.trained.version, np.int64),
        )

    @stage(protocol="METRIC")
    def update(self, experience: Experience) -> Metrics:
        """epochs x mini_batches optimizer steps.

        Raises StepRefused, and changes nothing, where a loss or a gradient is not finite.
        """
        measured: dict[str, float] = {}
        with self.trained.update(self._loss.epochs * self._loss.mini_batches):
            for batch in mini_batches(experience, self._loss, seed=self._seed + self.trained.version):
                accumulate(measured, self._optimizer_step(batch))
        return Metrics(values=mean_metrics(measured))

    def _optimizer_step(self, batch: Experience) -> dict[str, float]:
        weights = token_weights(batch.loss_mask, counts_of(batch.loss_mask), self._loss)
        total = 0.0
        for micro in micro_batches(batch, self._loss.tokens_per_micro_batch):
            values = token_values(self.trained.model, micro)
            per_token = value_loss(
                values, micro.column(batch.values), micro.column(batch.returns), self._loss.value_clip
            )
            loss = reduce_loss(per_token, micro.column(weights))
            loss.backward()
            total += loss.item()
        if not np.isfinite(total):
            raise StepRefused(f"critic.update of {named_rows(batch)}: loss is {total}")
        norm = self.trained.apply_gradients(f"critic.update of {named_rows(batch)}")
        return {"loss": total, "gradient_norm": norm, STEPS: 1.0}

    def save(self, folder: str) -> None:
        """See TrainedModel.save."""
        self.trained.save(folder)

    def load(self, folder: str) -> None:
        """See TrainedModel.load."""
        with torch.no_grad():
            self.trained.load(folder)


class CostCriticWorker(CriticWorker):
    """One rank of a critic of costs: the same model and loss, fitted to what a response cost."""

    @stage(protocol="METRIC")
    def update(self, experience: Experience) -> Metrics:
        """See CriticWorker.update."""
        return super().update(replace(experience, returns=experience.cost_returns, values=experience.cost_values))
