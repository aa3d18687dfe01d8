"""One number a response, whatever it means: by a rule on texts, or by a trained model at the last token.

Rewards and costs are both such numbers. A row that can't be judged is a failure with its cause, never a 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from protocols.control.requests import CodeSource
from protocols.data.columns import select
from protocols.data.messages import Rollouts
from protocols.stage import Failure
from workers.rewards.sandbox import RuleFailed, RuleProcess, RuleRequest
from workers.settings import Failures, Model, RewardPart
from workers.user_code import BadCode, module_of, source_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ScoredRows(NamedTuple):
    """The rows that have a number, in their order, and the others."""

    sample_ids: npt.NDArray[np.int64]  # [M]
    numbers: npt.NDArray[np.float32]  # [M] finite
    failures: list[Failure]
    parts: npt.NDArray[np.float32] | None = None  # [M, K] what a mixed judge's parts said, before their weights


class Scorer(Protocol):
    """Gives a number a row."""

    def judge(self, rollouts: Rollouts) -> ScoredRows:
        """A number for each row that has one, and why the others have none."""
        ...

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make a user's rule anew where its file is among these, and try it out. Raises BadCode."""
        ...

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next row on, or drop it."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class RuleScorer:
    """Judges texts by a rule, in a process of its own."""

    def __init__(self, model: Model, tokenizer_path: str, failures: Failures) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Tokenizer = Tokenizer.from_file(str(Path(tokenizer_path) / "tokenizer.json"))
        self._rule, self._timeout = model.rule, failures.reward_timeout_seconds
        self._process = RuleProcess(self._rule, self._timeout, _source_of(self._rule))
        self._next: RuleProcess | None = None  # of the rule that is about to take its place
        self._last: RuleRequest | None = None  # that got a score: a new rule is tried out on it
        self._retries = failures.reward_retries

    def judge(self, rollouts: Rollouts) -> ScoredRows:
        """A number a row; a row whose every attempt fails is failed with the last cause, its siblings are not."""
        results = [self._judge_row(rollouts, row) for row in range(len(rollouts))]
        scored = [row for row, result in enumerate(results) if not isinstance(result, Failure)]
        return ScoredRows(
            rollouts.sample_ids[scored],
            np.array([results[row] for row in scored], np.float32),
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
                score = self._process.score(request)
                self._last = request
                return score
            except RuleFailed as error:
                cause = str(error)
        return Failure(int(rollouts.sample_ids[row]), cause)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """A process of the new rule beside the running one; it has to score the row that was judged last."""
        self.switch_code(take=False)
        for source in sources:
            if source.module == module_of(self._rule):
                self._next = RuleProcess(self._rule, self._timeout, source)
                try:
                    self._next.start()
                    if self._last is not None:
                        self._next.score(self._last)
                except RuleFailed as error:
                    self.switch_code(take=False)
                    raise BadCode(str(error)) from error

    def switch_code(self, take: bool) -> None:
        """See Judge."""
        if self._next is not None:
            kept, gone = (self._next, self._process) if take else (self._process, self._next)
            self._process, self._next = kept, None
            gone.close()

    def close(self) -> None:
        """End the rule's process."""
        self.switch_code(take=False)
        self._process.close()


def _source_of(rule: str) -> CodeSource | None:
    """The module of a user's rule; None for a registered one, and for one that fails each row with the reason."""
    try:
        return source_of(module) if (module := module_of(rule)) else None
    except BadCode:
        return None


class ModelScorer:
    """Judges tokens by a trained model with one label, at the last token of prompt + response."""

    def __init__(self, model: Model, tokens_per_micro_batch: int, role: str) -> None:
        """`role` is named where the model fails a row."""
        from workers.training.models import load_reward

        self._model = load_reward(model.path, model.dtype).requires_grad_(False)
        self._budget = tokens_per_micro_batch
        self._role = role

    def judge(self, rollouts: Rollouts) -> ScoredRows:
        """A number a row; a row whose number is not finite is failed."""
        from workers.training.models import micro_batches, sequence_scores

        parts = [sequence_scores(self._model, b).detach().numpy() for b in micro_batches(rollouts, self._budget)]
        return scored(rollouts.sample_ids, np.concatenate(parts) if parts else np.empty(0, np.float32), self._role)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """It has no code of a user's."""

    def switch_code(self, take: bool) -> None:
        """See `prepare_code`."""

    def close(self) -> None:
        """It holds nothing but memory."""


def scored(sample_ids: npt.NDArray[np.int64], numbers: npt.NDArray[np.float32], role: str) -> ScoredRows:
    """What a model's numbers [N] say of the rows [N]: one that is not finite fails its row, under the role's name."""
    finite = np.isfinite(numbers)
    failures = [
        Failure(int(sample), f"{role} model gave {number}")
        for sample, number in zip(sample_ids[~finite], numbers[~finite], strict=True)
    ]
    return ScoredRows(sample_ids[finite], numbers[finite], failures)


class MixedScorer:
    """The weighted sum of several judges' numbers, each of which is kept beside it."""

    def __init__(self, parts: Sequence[tuple[RewardPart, Scorer]]) -> None:
        """Each part with who judges it, in the recipe's order."""
        self._parts = list(parts)

    def judge(self, rollouts: Rollouts) -> ScoredRows:
        """A number a row; a row that one part fails is failed with that part's name, and the next are not asked."""
        failures: list[Failure] = []
        said: list[ScoredRows] = []
        left = rollouts
        for part, judge in self._parts:
            scored = judge.judge(left)
            failures += [Failure(failure.sample_id, f"{part.name}: {failure.cause}") for failure in scored.failures]
            said.append(scored)
            left = select(left, scored.sample_ids)
        columns = [_numbers_of(scored, left.sample_ids) for scored in said]
        parts = np.stack(columns, axis=1).astype(np.float32)
        numbers = parts.astype(np.float64) @ np.array([part.weight for part, _ in self._parts])
        return ScoredRows(left.sample_ids, numbers.astype(np.float32), failures, parts)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """All parts that the files belong to."""
        for _, judge in self._parts:
            judge.prepare_code(sources)

    def switch_code(self, take: bool) -> None:
        """All parts at once."""
        for _, judge in self._parts:
            judge.switch_code(take)

    def close(self) -> None:
        """Free what the parts hold."""
        for _, judge in self._parts:
            judge.close()


def mixed_scorer(model: Model, tokenizer_path: str, tokens_per_micro_batch: int, failures: Failures) -> MixedScorer:
    """The judges of a mixed reward's parts."""

    def judge(part: RewardPart) -> Scorer:
        alone = Model(path=part.path, rule=part.rule, dtype=part.dtype)
        if part.rule:
            return RuleScorer(alone, tokenizer_path, failures)
        return ModelScorer(alone, tokens_per_micro_batch, "reward")

    return MixedScorer([(part, judge(part)) for part in model.mix])


def _numbers_of(scored: ScoredRows, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The numbers of the given rows, which are some of those judged, in their order."""
    return scored.numbers[np.isin(scored.sample_ids, sample_ids)]
