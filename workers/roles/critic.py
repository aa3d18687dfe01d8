"""The critic: predicts the return before each response token and is fitted to the observed returns.

All ranks of a topology call each method together, with their own replica's rows; one device is a topology of one rank.
A rank whose answer the service does not collect returns NOT_COLLECTED, which is None.
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, Metrics, Rollouts, Values
from protocols.roles import Critic
from workers.losses import metrics
from workers.losses.aggregation import reduce_loss
from workers.losses.tokens import trained
from workers.losses.value import value_loss
from workers.parallel.backends import trained_model
from workers.parallel.model import MicroLoss
from workers.parallel.sharding import NOT_COLLECTED, ONE_DEVICE, Sharding
from workers.settings import Loss, Model, Optimizer
from workers.training.micro_batches import MicroBatch
from workers.training.offload import Offloader
from workers.training.outputs import Outputs
from workers.training.trainable import TrainableModel


class CriticWorker(Critic):
    """One rank of a critic.

    Raises ValueError, with the numbers, where model, topology and torch.distributed's world don't fit.
    """

    def __init__(
        self, model: Model, loss: Loss, optimizer: Optimizer, seed: int, *, sharding: Sharding = ONE_DEVICE
    ) -> None:
        self.model = trained_model(model, sharding, head="value", seed=seed)
        self.trained = TrainableModel(self.model, model.path, model.learning_rate, optimizer)
        self.offloader = Offloader(self.model.device, self.trained.relocate)
        self._loss = loss
        self._seed = seed

    def values(self, rollouts: Rollouts) -> Values:
        """Values of this replica's rows under the current weights; each row carries their version."""
        values = self.model.outputs(rollouts, self._loss.tokens_per_micro_batch, _values_of)
        if values is None or not self.model.is_output_rank:
            return NOT_COLLECTED
        return Values(
            sample_ids=rollouts.sample_ids,
            values=rollouts.responses.with_values(values),
            versions=np.full(len(rollouts), self.trained.version, np.int64),
        )

    def update(self, experience: Experience) -> Metrics:
        """epochs x mini_batches optimizer steps on all replicas' rows. `experience` has this replica's, possibly none.

        The metrics are those of all rows on every replica, so that their mean is what one device measures.
        Raises StepRefused, on every rank, and changes nothing, where a loss or a gradient is not finite.
        """
        taken = self.trained.learn("critic.update", experience, self._loss, self._seed, self._batch_loss)
        return Metrics(values=metrics.mean_metrics(taken)) if self.model.is_output_rank else NOT_COLLECTED

    def save(self, folder: str) -> None:
        """See TrainableModel.save."""
        self.trained.save(folder)

    def load(self, folder: str) -> None:
        """See TrainableModel.load."""
        self.trained.load(folder)

    def export(self, folder: str) -> None:
        """See TrainableModel.export."""
        self.trained.export(folder)

    def _batch_loss(self, batch: Experience, weights: Jagged) -> MicroLoss:
        def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
            mask = micro.column(batch.loss_mask)
            values = trained(_values_of(outputs, micro), mask)
            before, returns = (trained(micro.column(column), mask) for column in (batch.values, batch.returns))
            per_token = value_loss(values, before, returns, self._loss.value_clip)
            return reduce_loss(per_token, micro.column(weights))

        return loss


class CostCriticWorker(CriticWorker):
    """One rank of a critic of costs: the same model and loss, fitted to what a response cost."""

    def update(self, experience: Experience) -> Metrics:
        """See CriticWorker.update."""
        return super().update(replace(experience, returns=experience.cost_returns, values=experience.cost_values))


def _values_of(outputs: Outputs, micro: MicroBatch) -> Tensor:
    return outputs.before_response(micro).squeeze(-1).float()
