"""The distribution that tokens are sampled from: the one definition of a token's log-prob in a run.

The torch engine samples from it, vLLM is asked for the same one, and the policy and the reference compute it again from
their own logits. So where the weights are the same, the ratio of the trained policy to the one that sampled is 1, with
truncated sampling too. In this order:

1. Ids that stand for no token have probability 0, and so have end tokens among the first `min_tokens`.
2. The logits are divided by the temperature. Temperature 0 takes the likeliest token; its log-prob is the one at
   temperature 1, and the truncations below have no effect.
3. min_p removes the tokens whose probability is less than min_p times the largest (Nguyen et al. 2024), top_k all but
   the k likeliest, and top_p all but the smallest set of likeliest tokens whose probability, after the first two, is
   top_p or more (Holtzman et al. 2020). The others are renormalised.

Every truncation keeps the tokens whose logit is at least some threshold of their row, so equal logits are kept or
removed together. The token that was sampled is kept even where these logits remove it, as rounding does near a
threshold and training does further away: its log-prob is finite, and has a gradient.

The reference is truncated by its own logits in the same way. So the KL to it is 0 where the two models are equal, and
finite everywhere; where they differ it can fall below 0, but not below the logarithm of the probability that the
reference's truncation keeps. An untruncated reference would add up to -log(top_p) to every token of equal models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protocols.roles import Sampling
from workers.data.vocabulary import ALL_TOKENS, Vocabulary
from workers.training.micro_batches import MicroBatch
from workers.training.models import log_softmax_of
from workers.training.outputs import Outputs

_ROWS_SORTED = 256  # at once: a sort of the whole vocabulary needs five times the memory of its logits


class TokenDistribution:
    """The distribution of a response's next token, as a function of the model's logits; see the module."""

    def __init__(self, sampling: Sampling, vocabulary: Vocabulary = ALL_TOKENS) -> None:
        self._sampling, self._vocabulary = sampling, vocabulary
        self._greedy = sampling.temperature == 0.0
        self._truncates = not self._greedy and (sampling.top_p < 1.0 or sampling.top_k > 0 or sampling.min_p > 0.0)
        self._ends = vocabulary.ends.union(sampling.stop_token_ids)
        self._masks: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor]] = {}

    def of_responses(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """Log-probs of the response tokens, [sum of T_i]."""
        (found,) = outputs.of_responses(batch, lambda *logits: (self.log_probs(*logits),))
        return found

    def log_probs(self, logits: Tensor, tokens: Tensor, positions: Tensor | int) -> Tensor:
        """Log-probs of these tokens, [n], from logits [n, V]: float32, float64 for float64 logits.

        `positions`, int64 [n] or one for all rows, count the response's tokens before this one.
        """
        return log_softmax_of(self.processed_with(logits, tokens, positions), tokens)

    def processed_with(self, logits: Tensor, tokens: Tensor, positions: Tensor | int) -> Tensor:
        """As `processed`, but these tokens [n], which were sampled, are kept."""
        scaled = self._scaled(logits)
        kept = self._kept(scaled, positions)
        if kept is None:
            return scaled
        return scaled.masked_fill(~kept.expand_as(scaled).scatter(-1, tokens.unsqueeze(-1), value=True), -math.inf)

    def processed(self, logits: Tensor, positions: Tensor | int) -> Tensor:
        """Logits whose softmax is this distribution, [n, V]: scaled, and -inf where a token is removed."""
        scaled = self._scaled(logits)
        kept = self._kept(scaled, positions)
        return scaled if kept is None else scaled.masked_fill(~kept, -math.inf)

    def sample(self, logits: Tensor, uniforms: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 [n] and their log-probs float32 [n], by inverting each row's cumulative distribution.

        `uniforms` are float64 [n] in [0, 1).
        """
        processed = self.processed(logits, position)
        # Not torch.log_softmax: on CPUs its float32 sum over a large vocabulary is too small by up to 1e-5.
        log_probs = processed - torch.logsumexp(processed, dim=-1, keepdim=True)
        if self._greedy:
            tokens = processed.argmax(-1)
        else:
            cumulative = log_probs.double().exp().cumsum(-1)
            targets = uniforms.unsqueeze(-1) * cumulative[:, -1:]
            tokens = (cumulative <= targets).sum(-1).clamp(max=logits.shape[-1] - 1)
        return tokens, log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def ends(self, tokens: Tensor) -> Tensor:
        """Which of these tokens end a response, bool [n]."""
        return torch.isin(tokens, torch.tensor(sorted(self._ends), dtype=torch.int64, device=tokens.device))

    def _scaled(self, logits: Tensor) -> Tensor:
        scaled = logits if logits.dtype == torch.float64 else logits.float()
        return scaled if self._sampling.temperature in (0.0, 1.0) else scaled / self._sampling.temperature

    @torch.no_grad()
    def _kept(self, scaled: Tensor, positions: Tensor | int) -> Tensor | None:
        """Which tokens keep a probability, bool [n, V], or [1, V] for all rows alike; None for all of them."""
        allowed = self._allowed(scaled, positions)
        if not self._truncates or not len(scaled):
            return allowed
        if allowed is not None:
            scaled = scaled.masked_fill(~allowed, -math.inf)
        kept = scaled >= torch.cat([self._thresholds(rows) for rows in scaled.split(_ROWS_SORTED)])
        return kept if allowed is None else kept & allowed

    def _allowed(self, scaled: Tensor, positions: Tensor | int) -> Tensor | None:
        """The tokens that may be sampled at all, bool [n or 1, V]; None for all of them."""
        tokens, ends = self._masks_for(scaled)
        early = torch.as_tensor(positions, device=scaled.device).reshape(-1, 1) < self._sampling.min_tokens
        if not self._sampling.min_tokens or not bool(early.any()):
            return tokens
        barred = early & ends
        return ~barred if tokens is None else tokens & ~barred

    def _masks_for(self, scaled: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which ids stand for tokens, None for all of them, and which of them end a response: bool [1, V] each."""
        key = (scaled.shape[-1], scaled.device)
        if key not in self._masks:
            rows = scaled.shape[-1]
            ends = torch.zeros((1, rows), dtype=torch.bool)
            ends[0, [token for token in self._ends if token < rows]] = True
            tokens = None
            if unknown := self._vocabulary.unknown(rows):
                tokens = torch.ones((1, rows), dtype=torch.bool)
                tokens[0, unknown] = False
            self._masks[key] = (tokens.to(scaled.device) if tokens is not None else None, ends.to(scaled.device))
        return self._masks[key]

    def _thresholds(self, scaled: Tensor) -> Tensor:
        """The least logit of each row that is kept, [n, 1]."""
        top_k, top_p, min_p = self._sampling.top_k, self._sampling.top_p, self._sampling.min_p
        least = torch.full_like(scaled[:, :1], -math.inf)
        if min_p > 0.0:
            least = scaled.amax(-1, keepdim=True) + math.log(min_p)
        if 0 < top_k < scaled.shape[-1]:
            least = torch.maximum(least, scaled.topk(top_k).values[:, -1:])
        if top_p < 1.0:
            # Summed from the least likely token up in float32, as vLLM does, so that rounding is the same.
            ascending = scaled.masked_fill(scaled < least, -math.inf).sort(-1).values
            removed = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
            removed[:, -1] = False
            least = ascending.gather(-1, removed.sum(-1, keepdim=True))
        return least
