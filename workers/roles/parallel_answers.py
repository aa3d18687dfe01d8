"""The models that only answer, on p-t-d ranks: the reference, reward models and cost models.

Every rank of the topology calls each method together, with its own replica's rows, perhaps none. A rank whose answer
is not collected returns None.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocols.data.messages import Costs, LogProbs, Rollouts, Scores
from protocols.layout.topology import Topology
from protocols.stage import Partial
from workers.parallel.model import ParallelModel
from workers.parallel.plan import Head
from workers.rewards.scoring import scored
from workers.settings import Generation, Loss, Model
from workers.training.models import DTYPES, MicroBatch, log_softmax_of
from workers.training.offload import Offloader


class ParallelReference:
    """One rank of the frozen policy that the KL term is measured against.

    Raises ValueError, with the numbers, where model, topology and torch.distributed's world don't fit.
    """

    def __init__(
        self,
        model: Model,
        topology: Topology,
        loss: Loss,
        generation: Generation,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = _frozen(model, topology, "tokens", device)
        self.residence = Offloader(self.model.device, self.model.relocate)
        self._budget = loss.tokens_per_micro_batch
        self._temperature = generation.temperature

    def log_probs(self, rollouts: Rollouts) -> LogProbs | None:
        """Log-probs of the response tokens of this replica's rows, at the sampling temperature."""

        def read(outputs: Tensor, micro: MicroBatch) -> Tensor:
            tokens = micro.response_tokens().to(outputs.device)
            return log_softmax_of(micro.before_response(outputs), tokens, self._temperature)

        kept = self.model.forward(rollouts, self._budget, read)
        if not self.model.is_output_rank:
            return None
        column = rollouts.responses.with_values(_joined(kept))
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=column)


class _ParallelScorer:
    """A model with one label, read at the last token of prompt + response."""

    def __init__(
        self,
        model: Model,
        topology: Topology,
        tokens_per_micro_batch: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = _frozen(model, topology, "score", device)
        self.residence = Offloader(self.model.device, self.model.relocate)
        self._budget = tokens_per_micro_batch

    def _numbers(self, rollouts: Rollouts) -> npt.NDArray[np.float32] | None:
        """A number a row [N], on the rank of its replica that answers."""
        kept = self.model.forward(rollouts, self._budget, _at_the_end)
        return _joined(kept) if self.model.is_output_rank else None


class ParallelReward(_ParallelScorer):
    """One rank of a reward model. Raises as ParallelReference does."""

    def score(self, rollouts: Rollouts) -> Partial[Scores] | None:
        """A score a row; a row whose score is not finite is failed."""
        if (numbers := self._numbers(rollouts)) is None:
            return None
        own = scored(rollouts.sample_ids, numbers, "reward")
        return Partial(Scores(sample_ids=own.sample_ids, scores=own.scores), own.failures)


class ParallelCost(_ParallelScorer):
    """One rank of a cost model. Raises as ParallelReference does."""

    def score(self, rollouts: Rollouts) -> Partial[Costs] | None:
        """A cost a row; a row whose cost is not finite is failed."""
        if (numbers := self._numbers(rollouts)) is None:
            return None
        own = scored(rollouts.sample_ids, numbers, "cost")
        return Partial(Costs(sample_ids=own.sample_ids, costs=own.scores), own.failures)


def _frozen(model: Model, topology: Topology, head: Head, device: torch.device | str) -> ParallelModel:
    own = ParallelModel(model.path, topology, head=head, dtype=DTYPES[model.dtype], device=device)
    for parameter in own.parameters.values():
        parameter.requires_grad_(False)
    return own


def _at_the_end(outputs: Tensor, micro: MicroBatch) -> Tensor:
    """[n, L, 1] -> [n]: the number at each row's last token."""
    rows = torch.arange(len(micro.rows), device=outputs.device)
    return outputs[rows, torch.from_numpy(micro.lengths - 1).to(outputs.device), 0]


def _joined(kept: list[Tensor]) -> npt.NDArray[np.float32]:
    """The micro-batches' numbers one after the other."""
    return torch.cat([part.float() for part in kept]).cpu().numpy() if kept else np.empty(0, np.float32)
