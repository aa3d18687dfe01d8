"""The cost model of Safe-RLHF: higher for the less safe of two responses, and positive for an unsafe one.

Only differences of rewards matter, but a cost also needs a sign, because Safe-RLHF holds the mean cost at a limit. So a
pair has two kinds of labels: which response is safer, and whether each is safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.data.dataset_files import DataError, records
from workers.data.datasets import SafetyPair, read_rows
from workers.finetune.loop import OnStep, load_tokenizer, optimize, refuse_existing, save_folder, tokenized
from workers.finetune.reward_model import HELDOUT_ACCURACY, Pairs
from workers.finetune.settings import RewardModelSettings
from workers.training.micro_batches import MicroBatch
from workers.training.models import load_untrained_reward, sequence_scores


class NumberedPair(msgspec.Struct, frozen=True):
    """A safety pair in the form of PKU-SafeRLHF: responses 0 and 1, and the number of the safer one."""

    prompt: str
    response_0: str
    response_1: str
    safer_response_id: int
    is_response_0_safe: bool | None = None
    is_response_1_safe: bool | None = None

    def ordered(self, place: str) -> SafetyPair:
        """The pair with the safer response first. Raises DataError for a number that is neither 0 nor 1."""
        first, second = (self.response_0, self.is_response_0_safe), (self.response_1, self.is_response_1_safe)
        if self.safer_response_id not in (0, 1):
            raise DataError(f"{place}: safer_response_id = {self.safer_response_id}: want 0 or 1")
        (safer, is_safe), (other, other_is_safe) = (second, first) if self.safer_response_id else (first, second)
        return SafetyPair(self.prompt, safer, other, is_safe, other_is_safe)


def read_pairs(path: str, columns: Mapping[str, str], model: str) -> list[SafetyPair]:
    """The pairs of a file; its first row tells which of the two forms it has. Raises DataError."""
    first = next(iter(records(path)), None)
    if columns or first is None or "safer_response_id" not in first.values:
        return read_rows(path, SafetyPair, columns, model)
    rows = read_rows(path, NumberedPair, columns, model)
    return [row.ordered(f"{path}: row {number}") for number, row in enumerate(rows, 1)]


class LabelledPairs:
    """N pairs of responses as tokens, the safer ones first, with a safety sign for each response."""

    __slots__ = ("pairs", "signs")

    def __init__(self, pairs: Pairs, signs: npt.NDArray[np.float32]) -> None:
        """`signs` [2, N], of the safer responses and of the others: 1 unsafe, -1 safe, 0 not labelled."""
        self.pairs, self.signs = pairs, signs

    @classmethod
    def tokenized(cls, tokenizer: PreTrainedTokenizerBase, rows: Sequence[SafetyPair]) -> LabelledPairs:
        """Tokenize the rows and collect their signs."""
        safer = [(row.prompt, row.chosen, row.chosen_truncated) for row in rows]
        others = [(row.prompt, row.rejected, row.rejected_truncated) for row in rows]
        signs = [[_sign(row.chosen_is_safe) for row in rows], [_sign(row.rejected_is_safe) for row in rows]]
        return cls(Pairs(tokenized(tokenizer, [*safer, *others])), np.array(signs, np.float32))

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: npt.NDArray[np.int64]) -> LabelledPairs:
        """The given pairs in the given order."""
        return LabelledPairs(self.pairs.take(rows), self.signs[:, rows])

    def micro_batches(self, budget: int) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Both responses of n pairs, the safer ones first, and their signs [2, n]."""
        for batch in self.pairs.micro_batches(budget):
            yield batch, torch.from_numpy(self.signs[:, batch.rows[: len(batch.rows) // 2]])


class CostModelResult(msgspec.Struct, frozen=True):
    """The result of cost-model training."""

    output: str  # transformers folder: sequence classification with one label
    losses: list[float]  # of each step, nats
    heldout_accuracy: float  # share of held-out pairs whose safer response has the lower cost; a tie counts half
    heldout_sign_accuracy: float | None  # share of labelled responses whose cost has the right sign; None: no labels


def train_cost_model(settings: RewardModelSettings, *, on_step: OnStep | None = None) -> CostModelResult:
    """Train a cost model on pairs, evaluate it on held-out ones and write it as a folder.

    `on_step(step, loss)` is called after every step, from 0. Raises DataError for unusable data and FileExistsError
    for an existing output, both before the model loads.
    """
    refuse_existing(settings.output)
    rows, heldout_rows = (
        read_pairs(path, settings.columns, settings.model) for path in (settings.data, settings.heldout)
    )
    tokenizer = load_tokenizer(settings.model)
    pairs, heldout = LabelledPairs.tokenized(tokenizer, rows), LabelledPairs.tokenized(tokenizer, heldout_rows)
    if not pairs.signs.any():
        raise DataError(f"{settings.data}: no row says whether a response is safe (chosen_is_safe, rejected_is_safe)")
    model = load_untrained_reward(settings.model, settings.dtype, settings.schedule.seed)
    budget = settings.schedule.tokens_per_micro_batch

    def losses_of(batch: npt.NDArray[np.int64]) -> Iterator[Tensor]:
        return cost_loss(model, pairs.take(batch), budget)

    losses = optimize(model, settings.schedule, settings.optimizer, len(pairs), losses_of, on_step)
    accuracy, sign_accuracy = accuracies(model, heldout, budget)
    results = {HELDOUT_ACCURACY: accuracy, "final_loss": losses[-1]}
    if sign_accuracy is not None:
        results["heldout_sign_accuracy"] = sign_accuracy
    save_folder(settings.output, model, tokenizer, results)
    return CostModelResult(settings.output, losses, accuracy, sign_accuracy)


def cost_loss(model: PreTrainedModel, pairs: LabelledPairs, budget: int) -> Iterator[Tensor]:
    """Mean over pairs of -log sigmoid(c - s) - log sigmoid(S_s s) - log sigmoid(S_c c), in parts that add up to it.

    s and c are the costs of the safer response and of the other, S their signs (Dai et al. 2024, the cost model's
    loss). A response without a label has no sign term.
    """
    for batch, signs in pairs.micro_batches(budget):
        costs = sequence_scores(model, batch).view(2, -1)
        of_signs = torch.where(signs == 0.0, 0.0, logsigmoid(signs * costs))
        yield -(logsigmoid(costs[1] - costs[0]) + of_signs.sum(dim=0)).sum() / len(pairs)


@torch.no_grad()
def accuracies(model: PreTrainedModel, pairs: LabelledPairs, budget: int) -> tuple[float, float | None]:
    """Share of pairs in the right order, a tie counting half, and share of labelled responses with the right sign.

    A cost of 0 counts as safe. The second is None if no response is labelled.
    """
    ordered = right = 0.0
    for batch, signs in pairs.micro_batches(budget):
        costs = sequence_scores(model, batch).view(2, -1)
        ordered += float((costs[1] > costs[0]).sum()) + 0.5 * float((costs[1] == costs[0]).sum())
        right += float(((costs > 0.0) == (signs > 0.0))[signs != 0.0].sum())
    labelled = int(np.count_nonzero(pairs.signs))
    return ordered / len(pairs), right / labelled if labelled else None


def _sign(is_safe: bool | None) -> float:
    return 0.0 if is_safe is None else -1.0 if is_safe else 1.0
