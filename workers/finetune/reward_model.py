"""The reward model: trained so that the better of two responses has the higher score (Bradley and Terry, 1952)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.data.datasets import Preference, read_rows
from workers.finetune.loop import (
    RESULTS,
    OnStep,
    Texts,
    load_tokenizer,
    optimize,
    refuse_existing,
    save_folder,
    tokenized,
)
from workers.finetune.settings import RewardModelSettings
from workers.training.micro_batches import MicroBatch, micro_batches
from workers.training.models import load_untrained_reward, sequence_scores

HELDOUT_ACCURACY = "heldout_pair_accuracy"  # its name in a folder's results


class Pairs:
    """N pairs of responses as 2N rows of tokens: the chosen ones in order, then the rejected ones."""

    __slots__ = ("texts",)

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    @classmethod
    def tokenized(cls, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference]) -> Pairs:
        """Tokenize preference rows."""
        chosen = [(row.prompt, row.chosen, row.chosen_truncated) for row in rows]
        rejected = [(row.prompt, row.rejected, row.rejected_truncated) for row in rows]
        return cls(tokenized(tokenizer, [*chosen, *rejected]))

    def __len__(self) -> int:
        return len(self.texts) // 2

    def take(self, pairs: npt.NDArray[np.int64]) -> Pairs:
        """The given pairs in the given order."""
        return Pairs(self.texts.take(np.concatenate([pairs, pairs + len(self)])))

    def micro_batches(self, budget: int) -> Iterator[MicroBatch]:
        """Micro-batches that keep both responses of a pair together: the chosen ones first, then the rejected ones."""
        lengths = (self.texts.prompts.lengths + self.texts.responses.lengths).reshape(2, len(self))
        longer = self.texts.take(lengths.argmax(axis=0) * len(self) + np.arange(len(self)))
        for cut in micro_batches(longer, budget // 2):
            yield MicroBatch(self.texts, np.concatenate([cut.rows, cut.rows + len(self)]))


class RewardModelResult(msgspec.Struct, frozen=True):
    """The result of reward-model training."""

    output: str  # transformers folder: sequence classification with one label
    losses: list[float]  # of each step, nats
    heldout_accuracy: float  # share of held-out pairs whose chosen response has the higher score; a tie counts half


def train_reward_model(settings: RewardModelSettings, *, on_step: OnStep | None = None) -> RewardModelResult:
    """Train a reward model on pairs, evaluate it on held-out ones and write it as a folder.

    `on_step(step, loss)` is called after every step, from 0. Raises DataError for unusable data and FileExistsError
    for an existing output, both before the model loads.
    """
    refuse_existing(settings.output)
    rows = read_rows(settings.data, Preference, settings.columns, settings.model)
    heldout_rows = read_rows(settings.heldout, Preference, settings.columns, settings.model)
    tokenizer = load_tokenizer(settings.model)
    pairs, heldout = Pairs.tokenized(tokenizer, rows), Pairs.tokenized(tokenizer, heldout_rows)
    model = load_untrained_reward(settings.model, settings.dtype, settings.schedule.seed)
    budget = settings.schedule.tokens_per_micro_batch

    def losses_of(batch: npt.NDArray[np.int64]) -> Iterator[Tensor]:
        return pair_loss(model, pairs.take(batch), budget, settings.centring)

    losses = optimize(model, settings.schedule, settings.optimizer, len(pairs), losses_of, on_step)
    accuracy = pair_accuracy(model, heldout, budget)
    save_folder(settings.output, model, tokenizer, {HELDOUT_ACCURACY: accuracy, "final_loss": losses[-1]})
    return RewardModelResult(settings.output, losses, accuracy)


def heldout_accuracy_of(folder: str | Path) -> float:
    """The held-out accuracy that `train_reward_model` wrote into the folder."""
    return float(json.loads((Path(folder) / RESULTS).read_text())[HELDOUT_ACCURACY])


def pair_loss(model: PreTrainedModel, pairs: Pairs, budget: int, centring: float) -> Iterator[Tensor]:
    """Mean over pairs of -log sigmoid(c - r) + centring * (c + r)^2, in one part per micro-batch; the parts add up.

    c and r are the scores of the chosen and the rejected response. The second term (Eisenstein et al. 2023) fixes the
    level of the scores, which differences alone leave free.
    """
    for batch in pairs.micro_batches(budget):
        chosen, rejected = sequence_scores(model, batch).chunk(2)
        loss = -logsigmoid(chosen - rejected) + centring * (chosen + rejected).square()
        yield loss.sum() / len(pairs)


@torch.no_grad()
def pair_accuracy(model: PreTrainedModel, pairs: Pairs, budget: int) -> float:
    """Share of pairs whose chosen response has the higher score; a tie counts half."""
    won = 0.0
    for batch in pairs.micro_batches(budget):
        chosen, rejected = sequence_scores(model, batch).chunk(2)
        won += float((chosen > rejected).sum()) + 0.5 * float((chosen == rejected).sum())
    return won / len(pairs)
