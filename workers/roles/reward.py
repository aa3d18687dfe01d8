"""Rewards as a role: a rule on texts, a trained reward model on tokens, or a weighted mix of such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from protocols.data.columns import Jagged
from protocols.data.messages import Rollouts, Scores
from protocols.roles import Reward
from protocols.stage import Partial
from workers.parallel.sharding import NOT_COLLECTED, ONE_DEVICE, Sharding
from workers.rewards.scoring import MixedScorer, RuleScorer, Scorer
from workers.roles.scorer_role import ScorerRole
from workers.settings import Failures, Model, RewardPart

if TYPE_CHECKING:
    from workers.parallel.model import ParallelModel
    from workers.training.offload import Offloader


class RewardWorker(ScorerRole, Reward):
    """One rank of a reward. Its scorer's numbers are the scores."""

    def score(self, rollouts: Rollouts) -> Partial[Scores]:
        """A score a row; a row that can't be scored fails with its cause."""
        if (scored := self._scorer.score(rollouts)) is None:
            return NOT_COLLECTED
        scores = Scores(sample_ids=scored.sample_ids, scores=scored.scores)
        if scored.parts is not None:
            rows, parts = scored.parts.shape
            scores = replace(scores, parts=Jagged.from_lengths(scored.parts.ravel(), np.full(rows, parts)))
        return Partial(scores, scored.failures)


class RuleReward(RewardWorker):
    """Scores texts by a rule, in a process of its own."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        super().__init__(RuleScorer(model, tokenizer_path, failures))


class ModelReward(RewardWorker):
    """Scores tokens by a trained reward model, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int, *, sharding: Sharding = ONE_DEVICE) -> None:
        from workers.roles.model_scorer import ModelScorer

        scorer = ModelScorer(model, tokens_per_micro_batch, "reward", sharding)
        super().__init__(scorer, scorer.offloader)
        self.model = scorer.model


class MixedReward(RewardWorker):
    """The weighted sum of rules and models, with the number of each part."""

    def __init__(
        self,
        model: Model,
        tokenizer_path: str,
        tokens_per_micro_batch: int,
        failures: Failures,
        *,
        sharding: Sharding = ONE_DEVICE,
    ) -> None:
        models: list[ParallelModel] = []

        def scorer_of(part: RewardPart) -> Scorer:
            alone = Model(path=part.path, rule=part.rule, dtype=part.dtype)
            if part.rule:
                return RuleScorer(alone, tokenizer_path, failures)
            from workers.roles.model_scorer import ModelScorer

            scorer = ModelScorer(alone, tokens_per_micro_batch, "reward", sharding)
            models.append(scorer.model)
            return scorer

        super().__init__(MixedScorer([(part, scorer_of(part)) for part in model.mix]), _offloader_of(models))


def _offloader_of(models: Sequence[ParallelModel]) -> Offloader | None:
    """Moves all models of a mix together; None where it has none."""
    if not models:
        return None
    from workers.training.offload import Offloader

    return Offloader(models[0].device, lambda copy: sum(model.relocate(copy) for model in models))
