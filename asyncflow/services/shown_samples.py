"""Chooses a few samples of a closed batch and writes them as text, for a person to read.

The service that closes batches does it, because no other has a sample's rows, reward and advantage together. It works
while the batch is already on its way to the trainers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import SupportsFloat

import numpy as np

from asyncflow.observe.settings import SampleTable
from protocols.control.samples import ShownSample
from protocols.data.columns import Batch, rows_of
from protocols.data.messages import Costs, Experience, Finish, Rollouts, Scores
from workers.data.tokenizer import Tokenizer


class SampleShow:
    """The table of one run. The tokenizer is read when the first table is made."""

    def __init__(self, table: SampleTable, tokenizer_path: str) -> None:
        self._table, self._tokenizer_path = table, tokenizer_path

    def due(self, step: int) -> bool:
        """Whether a table is made of this step; 1 is the first."""
        return bool(self._tokenizer_path) and self._table.due(step)

    def of(self, inputs: Sequence[Batch], experience: Batch) -> list[ShownSample]:
        """Some rows of the experience, from the lowest reward to the highest; none where rewards or texts lack.

        `inputs`: what the experience was made of. Of inputs of one kind the first is the samples' own.
        """
        rollouts = next((batch for batch in inputs if isinstance(batch, Rollouts)), None)
        scores = next((batch for batch in inputs if isinstance(batch, Scores)), None)
        if rollouts is None or scores is None or not isinstance(experience, Experience) or not len(experience):
            return []
        costs = next((batch for batch in inputs if isinstance(batch, Costs)), None)
        samples = chosen(experience.sample_ids, scores.scores[rows_of(scores, experience.sample_ids)], self._table.rows)
        of_rollouts, of_scores, of_experience = (rows_of(b, samples) for b in (rollouts, scores, experience))
        of_costs = None if costs is None else costs.costs[rows_of(costs, samples)]
        prompts, responses = (
            self._tokenizer.decode((column[row] for row in of_rollouts), special=True)
            for column in (rollouts.prompts, rollouts.responses)
        )
        return [
            ShownSample(
                sample=int(sample),
                prompt=self._shortened(prompts[i]),
                response=self._shortened(responses[i]),
                reference=self._shortened(rollouts.references.text(of_rollouts[i])),
                reward=_finite(scores.scores[of_scores[i]]),
                parts=_parts(scores, of_scores[i]),
                cost=None if of_costs is None else _finite(of_costs[i]),
                advantage=_mean_advantage(experience, of_experience[i]),
                versions=_oldest_and_newest(rollouts, of_rollouts[i]),
                tokens=len(rollouts.responses[of_rollouts[i]]),
                cut=bool(rollouts.finishes[of_rollouts[i]] == Finish.LENGTH),
            )
            for i, sample in enumerate(samples)
        ]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._tokenizer_path)

    def _shortened(self, text: str) -> str:
        return shortened(text, self._table.characters)


def chosen(sample_ids: np.ndarray, rewards: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of these samples [N]: the lowest reward, the highest, and others at equal ranks between them."""
    order = np.argsort(rewards, kind="stable")
    ranks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(np.int64)
    return sample_ids[order[ranks]]


def shortened(text: str, characters: int) -> str:
    """A text without its middle where it is longer than `characters`."""
    if len(text) <= characters:
        return text
    end = characters // 2
    return f"{text[: characters - end]}[... {len(text) - characters:,} characters ...]{text[len(text) - end :]}"


def _parts(scores: Scores, row: int) -> dict[str, float]:
    names = scores.names.text(row) if len(scores.names.values) else ""
    return dict(zip(names.split("\n"), scores.parts[row].tolist(), strict=True)) if names else {}


def _mean_advantage(experience: Experience, row: int) -> float | None:
    trained = experience.advantages[row][experience.loss_mask[row] != 0]
    return _finite(trained.mean()) if len(trained) else 0.0


def _finite(value: SupportsFloat) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _oldest_and_newest(rollouts: Rollouts, row: int) -> tuple[int, int]:
    versions = rollouts.versions[row]
    return (int(versions.min()), int(versions.max())) if len(versions) else (0, 0)
