"""The held-out sets of a run: what is asked of each, and the curves that its scores make. Pure."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from asyncflow.control.admission.prompts import PromptSource
from protocols.data.ids import prompts_of
from protocols.data.messages import Prompts, Scores
from protocols.roles import Sampling


class EvaluationSet(msgspec.Struct, frozen=True):
    """One set of held-out prompts, how they are answered, and by what the answers are scored."""

    name: str  # "" for the only set of a recipe
    scorers: dict[str, str]  # metric -> the service that scores it
    sampling: Sampling
    samples: int  # answers to each prompt
    limit: int  # rows of the file; 0: all
    pass_at: list[int]  # the k of pass@k
    pass_score: float  # an answer with this score or more passes

    def curves(self, metric: str) -> list[str]:
        """The names of a metric's curves: of its mean, then of each pass@k."""
        mean = f"{self.name}.{metric}" if self.name else metric
        return [mean, *(f"{mean}.pass@{k}" for k in self.pass_at)]

    def rows(self, source: PromptSource, min_version: int, first: int) -> Prompts:
        """The rows to answer; `first` is the ordinal of the set's first row among those of all sets."""
        return source.evaluation(min_version, self.limit, self.samples, first)

    def points(self, scores: Scores) -> list[float]:
        """The values of a metric's `curves`: the mean score of all answers, then pass@k over the prompts."""
        _, prompts = np.unique(prompts_of(scores.sample_ids), return_inverse=True)
        answers = np.bincount(prompts)
        passed = np.bincount(prompts[scores.scores >= self.pass_score], minlength=len(answers))
        return [float(scores.scores.mean()), *(float(pass_at(k, answers, passed).mean()) for k in self.pass_at)]


def pass_at(k: int, answers: npt.NDArray[np.intp], passed: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """The probability that at least one of k answers passes, for each prompt: [N], estimated from n >= k answers.

    1 - C(n - c, k) / C(n, k), where c of the n answers passed: unbiased, which 1 - (1 - c / n)^k is not (Chen et al.
    2021, "Evaluating large language models trained on code"). As a product, since the coefficients would overflow.
    """
    all_fail = np.ones(len(answers))
    for i in range(k):
        all_fail *= np.clip(answers - passed - i, 0, None) / (answers - i)
    return 1.0 - all_fail
