"""Rewards as a role: a rule on texts, or a trained reward model on tokens."""

from __future__ import annotations

from protocols.messages import Rollouts, Scores
from protocols.roles import Reward
from protocols.stage import Partial, stage
from workers.judging import ModelJudge, RuleJudge
from workers.settings import Failures, Model


class _JudgedReward(Reward):
    """A judge's numbers are scores."""

    def __init__(self, judge: RuleJudge | ModelJudge) -> None:
        self._judge = judge

    @stage(protocol="DP_PROTO", balance="tokens")
    def score(self, rollouts: Rollouts) -> Partial[Scores]:
        """A score a row; see the judges for the rows that fail."""
        judged = self._judge.judge(rollouts)
        return Partial(Scores(sample_ids=judged.sample_ids, scores=judged.numbers), judged.failures)

    def close(self) -> None:
        """Free what the judge holds."""
        self._judge.close()


class RuleReward(_JudgedReward):
    """Scores texts by a rule, in a process of its own."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        super().__init__(RuleJudge(model, tokenizer_path, failures))


class ModelReward(_JudgedReward):
    """Scores tokens by a trained reward model, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int) -> None:
        super().__init__(ModelJudge(model, tokens_per_micro_batch, "reward"))
