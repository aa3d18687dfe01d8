"""The probe batch of a publication: a trainer's answer to it, and how far a correct engine's answer may be off."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protocols.roles import Sampling
from protocols.weights import Probe
from workers.data.token_rows import TokenRows
from workers.data.vocabulary import ALL_TOKENS, Vocabulary
from workers.parallel.model import ParallelModel
from workers.parallel.rounding import randomly_rounded
from workers.training.token_distribution import TokenDistribution

ROWS = 4
# A correct engine differs by up to 0.83 times what random rounding changes, and by up to 1.5 where a token's
# choice among experts may turn, see `workers.parallel.rounding`.
MARGIN = 2.0
LEAST = 1e-5  # of a tolerance, nats: log-sum-exp itself is rounded, whatever the weights are


@torch.no_grad()
def answered_probe(
    model: ParallelModel, row_tokens: int, seed: int, tolerance: float = 0.0, vocabulary: Vocabulary = ALL_TOKENS
) -> Probe:
    """The batch that `seed` and the vocabulary decide, ROWS of `row_tokens`, and the model's answer, on every rank.

    Ids that stand for no token are not in it. A `tolerance` of 0 stands for MARGIN times what random rounding in the
    model's dtype changes, which takes a second forward. All ranks call together.
    """
    size = int(model.config.vocab_size)
    known = np.setdiff1d(np.arange(size), vocabulary.unknown(size))
    tokens = known[np.random.default_rng([seed, size]).integers(0, len(known), (ROWS, row_tokens))]
    batch, plain = TokenRows.of(tokens[:, :1], tokens[:, 1:]), TokenDistribution(Sampling(), vocabulary)
    answers = _answers(model, batch, plain)
    if not tolerance:
        with randomly_rounded(model.shard, model.dtype, seed):
            changed = float((_answers(model, batch, plain) - answers).square().mean().sqrt())
        tolerance = max(MARGIN * changed, LEAST)
    return Probe(tokens.tolist(), answers.view(ROWS, -1).tolist(), tolerance)


def _answers(model: ParallelModel, batch: TokenRows, plain: TokenDistribution) -> Tensor:
    """Log-probs of the tokens but each row's first, float32 flat, on every rank."""
    budget = len(batch.prompts.values) + len(batch.responses.values)
    kept = model.forward(batch, budget, plain.of_responses)
    answers = kept[0] if kept else torch.empty(len(batch.responses.values), device=model.device)
    replica = model.groups.replica
    return replica.broadcast_(answers, replica.ranks[(model.plan.pp - 1) * model.plan.tp])
