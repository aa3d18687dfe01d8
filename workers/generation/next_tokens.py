"""Samples the next token of each row of a batch, whose rows may be sampled in different ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protocols.roles import Sampling
from workers.data.vocabulary import Vocabulary
from workers.generation.stop_texts import StopTexts
from workers.training.token_distribution import TokenDistribution


class NextTokens:
    """The sampling of one static batch: rows that start together and leave one by one."""

    def __init__(self, samplings: Sequence[Sampling], uniforms: Tensor, vocabulary: Vocabulary) -> None:
        """One sampling a row; `uniforms`, float64 [n, T], has a number for each of its tokens."""
        kinds = list(dict.fromkeys(samplings))
        self._uniforms = uniforms
        self._distributions = [TokenDistribution(sampling, vocabulary) for sampling in kinds]
        self._kinds = torch.tensor([kinds.index(sampling) for sampling in samplings], device=uniforms.device)
        stops = enumerate(StopTexts.of(sampling, vocabulary) for sampling in samplings)
        self._stops = {row: texts for row, texts in stops if texts is not None}

    def sample(self, logits: Tensor, rows: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 [n], their log-probs float32 [n], and which of them end their response, bool [n].

        `logits` [n, V] are those of the batch's `rows`, int64 [n], of which each has `position` tokens.
        """
        kinds, uniforms = self._kinds[rows], self._uniforms[rows, position]
        tokens = torch.empty_like(rows)
        log_probs = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
        ended = torch.empty(len(rows), dtype=torch.bool, device=logits.device)
        for kind, distribution in enumerate(self._distributions):
            own = (kinds == kind).nonzero().squeeze(-1)
            if len(own):
                tokens[own], log_probs[own] = distribution.sample(logits[own], uniforms[own], position)
                ended[own] = distribution.ends(tokens[own])
        if self._stops:
            ended |= self._complete_a_text(rows, tokens)
        return tokens, log_probs, ended

    def _complete_a_text(self, rows: Tensor, tokens: Tensor) -> Tensor:
        pairs = zip(rows.tolist(), tokens.tolist(), strict=True)
        ended = [row in self._stops and self._stops[row].completed_by(token) for row, token in pairs]
        return torch.tensor(ended, device=tokens.device)
