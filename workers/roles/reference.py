"""The reference: the frozen policy that the KL term is measured against."""

from __future__ import annotations

from protocols.data.messages import LogProbs, Rollouts
from protocols.roles import Reference
from workers.data.token_rows import response_column
from workers.data.vocabulary import Vocabulary
from workers.parallel.backends import frozen_model
from workers.parallel.sharding import NOT_COLLECTED, ONE_DEVICE, Sharding
from workers.settings import Generation, Loss, Model
from workers.training.offload import Offloader
from workers.training.token_distribution import TokenDistribution


class ReferenceWorker(Reference):
    """One rank of the reference.

    `vocabulary` is the policy's, by default that of the model's own folder. Raises ValueError, with the numbers, where
    model, topology and torch.distributed's world don't fit.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        generation: Generation,
        *,
        vocabulary: Vocabulary | None = None,
        sharding: Sharding = ONE_DEVICE,
    ) -> None:
        self.model = frozen_model(model, sharding)
        self.offloader = Offloader(self.model.device, self.model.relocate)
        self._budget = loss.tokens_per_micro_batch
        self._distribution = TokenDistribution(generation.sampling, vocabulary or Vocabulary.of(model.path))

    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """Log-probs of this replica's rows, of the distribution that this model would sample from."""
        values = self.model.outputs(rollouts, self._budget, self._distribution.of_responses)
        if values is None or not self.model.is_output_rank:
            return NOT_COLLECTED
        log_probs = response_column(rollouts.responses, rollouts.loss_mask, values)
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=log_probs)
