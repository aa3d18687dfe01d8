"""What rewards and costs have in common: a scorer, the code it calls, and the device of its models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from protocols.control.code import CodeSource
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.rewards.rule_scorer import RuleScorer
from workers.rewards.scoring import MixedScorer, Scorer
from workers.settings import Failures, Model

if TYPE_CHECKING:
    from workers.parallel.model import ParallelModel
    from workers.training.offload import Offloader

NO_FAILURES = Failures()  # the settings of a model that calls no rule


class ScorerRole:
    """One rank of a role whose answers are a scorer's values.

    They come from a rule on texts, in processes of its own, from a trained model on tokens, at the last token of
    prompt + response, or from a weighted mix of both.
    """

    role: ClassVar[str]  # its name in failures of a model

    def __init__(
        self,
        model: Model,
        tokens_per_micro_batch: int,
        tokenizer_path: str = "",
        failures: Failures = NO_FAILURES,
        *,
        sharding: Sharding = ONE_DEVICE,
    ) -> None:
        """`tokenizer_path` and `failures` are for rules, the other arguments for models."""
        self.models: list[ParallelModel] = []

        def scorer_of(model: Model) -> Scorer:
            if model.rule:
                return RuleScorer(model.rule, tokenizer_path, failures)
            from workers.roles.model_scorer import ModelScorer  # rules do without torch

            scorer = ModelScorer(model, tokens_per_micro_batch, self.role, sharding)
            self.models.append(scorer.model)
            return scorer

        parts = [(part, scorer_of(Model(path=part.path, rule=part.rule, dtype=part.dtype))) for part in model.mix]
        self._scorer = MixedScorer(parts) if parts else scorer_of(model)
        self.offloader = _offloader_of(self.models)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make the scorer's rules anew from their files. Raises BadCode."""
        self._scorer.prepare_code(sources)

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next row on, or drop it."""
        self._scorer.switch_code(take)

    def close(self) -> None:
        """Free what the scorer holds."""
        self._scorer.close()


def _offloader_of(models: Sequence[ParallelModel]) -> Offloader | None:
    """Moves all models together; None where there is none."""
    if not models:
        return None
    from workers.training.offload import Offloader

    return Offloader(models[0].device, lambda copy: sum(model.relocate(copy) for model in models))
