"""The critic on p-t-d ranks: the stages and the step of `CriticWorker`, as one process would do them.

Every rank of the topology calls each method together, with its own replica's rows. A rank whose answer is not
collected returns None.
"""

from __future__ import annotations

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from protocols.data.columns import Jagged
from protocols.data.messages import Experience, Metrics, Rollouts, Values
from protocols.layout.topology import Backend, Topology
from workers.losses.aggregation import reduce_loss
from workers.losses.metrics import mean_metrics
from workers.losses.value import value_loss
from workers.parallel.backends import parallel_model
from workers.parallel.model import Loss as LossOf
from workers.parallel.trainable import ParallelTraining
from workers.settings import Loss, Model, Optimizer
from workers.training.models import DTYPES, MicroBatch
from workers.training.offload import Offloader


class ParallelCritic:
    """One rank of a critic that is shared by the ranks of a topology.

    Raises ValueError, with the numbers, where model, topology and torch.distributed's world don't fit.
    """

    def __init__(
        self,
        model: Model,
        topology: Topology,
        loss: Loss,
        optimizer: Optimizer,
        seed: int,
        *,
        backend: Backend = "3d",
        device: torch.device | str = "cpu",
        recompute: bool = False,
    ) -> None:
        self.model = parallel_model(
            backend, model.path, topology, head="value", dtype=DTYPES[model.dtype], device=device, recompute=recompute
        )
        self.trained = ParallelTraining(self.model, model.path, model.learning_rate, optimizer)
        self.residence = Offloader(self.model.device, self.trained.relocate)
        self._loss = loss
        self._seed = seed

    def values(self, rollouts: Rollouts) -> Values | None:
        """Values of this replica's rows under the current weights; each row carries their version."""
        values = self.trained.per_response(rollouts, self._loss.tokens_per_micro_batch, _values_of)
        if values is None or not self.model.is_output_rank:
            return None
        versions = np.full(len(rollouts), self.trained.version, np.int64)
        return Values(sample_ids=rollouts.sample_ids, values=values, versions=versions)

    def update(self, experience: Experience) -> Metrics | None:
        """epochs x mini_batches optimizer steps on all replicas' rows, of which these are the own ones, perhaps none.

        The metrics are those of all rows on every replica, so that their mean is what one process measures.
        Raises StepRefused, on every rank, and changes nothing, where a loss or a gradient is not finite.
        """
        taken = self.trained.learn("critic.update", experience, self._loss, self._seed, self._objective)
        return Metrics(values=mean_metrics(taken)) if self.model.is_output_rank else None

    def save(self, folder: str) -> None:
        """See ParallelTraining.save."""
        self.trained.save(folder)

    def load(self, folder: str) -> None:
        """See ParallelTraining.load."""
        self.trained.load(folder)

    def export(self, folder: str) -> None:
        """See ParallelTraining.export."""
        self.trained.export(folder)

    def _objective(self, batch: Experience, weights: Jagged) -> LossOf:
        def loss(outputs: Tensor, micro: MicroBatch) -> Tensor:
            before, returns, weight = (
                micro.column(column).to(outputs.device) for column in (batch.values, batch.returns, weights)
            )
            return reduce_loss(value_loss(_values_of(outputs, micro), before, returns, self._loss.value_clip), weight)

        return loss


class ParallelCostCritic(ParallelCritic):
    """One rank of a critic of costs: the same model and loss, fitted to what a response cost."""

    def update(self, experience: Experience) -> Metrics | None:
        """See ParallelCritic.update."""
        return super().update(replace(experience, returns=experience.cost_returns, values=experience.cost_values))


def _values_of(outputs: Tensor, micro: MicroBatch) -> Tensor:
    return micro.before_response(outputs).float().squeeze(-1)
