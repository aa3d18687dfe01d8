"""The reference: the frozen policy that the KL term is measured against."""

from __future__ import annotations

from protocols.data.messages import LogProbs, Rollouts
from protocols.roles import Reference
from protocols.stage import stage
from workers.settings import Generation, Loss, Model
from workers.training.models import load_causal, per_response, token_log_probs


class ReferenceWorker(Reference):
    """One rank of the reference."""

    def __init__(self, model: Model, loss: Loss, generation: Generation) -> None:
        self._model = load_causal(model.path, model.dtype).requires_grad_(False)
        self._budget = loss.tokens_per_micro_batch
        self._temperature = generation.temperature

    @stage(protocol="3D_PROTO")
    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """Log-probs of the response tokens, at the sampling temperature."""
        column = per_response(rollouts, self._budget, lambda b: token_log_probs(self._model, b, self._temperature))
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=column)
