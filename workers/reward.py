"""Rewards as a role: a rule on texts, or a trained reward model on tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from protocols.columns import take
from protocols.messages import Rollouts, Scores
from protocols.roles import Reward
from protocols.stage import Failure, Partial, stage
from workers.rewards.sandbox import RuleFailed, RuleProcess, RuleRequest
from workers.settings import Failures, Model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class RuleReward(Reward):
    """Scores texts by a rule, in a process of its own."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Tokenizer = Tokenizer.from_file(str(Path(tokenizer_path) / "tokenizer.json"))
        self._process = RuleProcess(model.rule, failures.reward_timeout_seconds)
        self._retries = failures.reward_retries

    @stage(protocol="DP_PROTO")
    def score(self, rollouts: Rollouts) -> Partial[Scores]:
        """A score a row; a row whose every attempt fails is failed with the last cause, its siblings are not."""
        scored: list[int] = []
        values: list[float] = []
        failures: list[Failure] = []
        for row in range(len(rollouts)):
            result = self._score_row(rollouts, row)
            if isinstance(result, Failure):
                failures.append(result)
            else:
                scored.append(row)
                values.append(result)
        kept = take(rollouts, scored)
        return Partial(Scores(sample_ids=kept.sample_ids, scores=np.array(values, np.float32)), failures)

    def _score_row(self, rollouts: Rollouts, row: int) -> float | Failure:
        request = RuleRequest(
            prompt=self._tokenizer.decode(rollouts.prompts[row].tolist(), skip_special_tokens=True),
            response=self._tokenizer.decode(rollouts.responses[row].tolist(), skip_special_tokens=True),
            reference=rollouts.references.text(row),
        )
        cause = ""
        for _ in range(self._retries + 1):
            try:
                return self._process.score(request)
            except RuleFailed as error:
                cause = str(error)
        return Failure(int(rollouts.sample_ids[row]), cause)

    def close(self) -> None:
        """End the rule's process."""
        self._process.close()


class ModelReward(Reward):
    """Scores tokens by a trained reward model, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int) -> None:
        from workers.models import load_reward

        self._model = load_reward(model.path, model.dtype).requires_grad_(False)
        self._budget = tokens_per_micro_batch

    @stage(protocol="DP_PROTO")
    def score(self, rollouts: Rollouts) -> Partial[Scores]:
        """A score a row; a row whose score is not finite is failed."""
        from workers.models import micro_batches, sequence_scores

        parts = [sequence_scores(self._model, b).detach().numpy() for b in micro_batches(rollouts, self._budget)]
        scores = np.concatenate(parts) if parts else np.empty(0, np.float32)
        finite = np.isfinite(scores)
        failures = [
            Failure(int(i), f"reward model gave {s}")
            for i, s in zip(rollouts.sample_ids[~finite], scores[~finite], strict=True)
        ]
        return Partial(Scores(sample_ids=rollouts.sample_ids[finite], scores=scores[finite]), failures)
