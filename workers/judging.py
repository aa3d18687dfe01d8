"""One number a response, whatever it means: by a rule on texts, or by a trained model at the last token.

Rewards and costs are both such numbers. A row that can't be judged is a failure with its cause, never a 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.messages import Rollouts
from protocols.stage import Failure
from workers.rewards.sandbox import RuleFailed, RuleProcess, RuleRequest
from workers.settings import Failures, Model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Judged(NamedTuple):
    """The rows that have a number, in their order, and the others."""

    sample_ids: npt.NDArray[np.int64]  # [M]
    numbers: npt.NDArray[np.float32]  # [M] finite
    failures: list[Failure]


class RuleJudge:
    """Judges texts by a rule, in a process of its own."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Tokenizer = Tokenizer.from_file(str(Path(tokenizer_path) / "tokenizer.json"))
        self._process = RuleProcess(model.rule, failures.reward_timeout_seconds)
        self._retries = failures.reward_retries

    def judge(self, rollouts: Rollouts) -> Judged:
        """A number a row; a row whose every attempt fails is failed with the last cause, its siblings are not."""
        results = [self._judge_row(rollouts, row) for row in range(len(rollouts))]
        judged = [row for row, result in enumerate(results) if not isinstance(result, Failure)]
        return Judged(
            rollouts.sample_ids[judged],
            np.array([results[row] for row in judged], np.float32),
            [result for result in results if isinstance(result, Failure)],
        )

    def _judge_row(self, rollouts: Rollouts, row: int) -> float | Failure:
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


class ModelJudge:
    """Judges tokens by a trained model with one label, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int, role: str) -> None:
        """`role` is named where the model fails a row."""
        from workers.models import load_reward

        self._model = load_reward(model.path, model.dtype).requires_grad_(False)
        self._budget = tokens_per_micro_batch
        self._role = role

    def judge(self, rollouts: Rollouts) -> Judged:
        """A number a row; a row whose number is not finite is failed."""
        from workers.models import micro_batches, sequence_scores

        parts = [sequence_scores(self._model, b).detach().numpy() for b in micro_batches(rollouts, self._budget)]
        numbers = np.concatenate(parts) if parts else np.empty(0, np.float32)
        finite = np.isfinite(numbers)
        failures = [
            Failure(int(i), f"{self._role} model gave {number}")
            for i, number in zip(rollouts.sample_ids[~finite], numbers[~finite], strict=True)
        ]
        return Judged(rollouts.sample_ids[finite], numbers[finite], failures)

    def close(self) -> None:
        """It holds nothing but memory."""
