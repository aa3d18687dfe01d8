"""The cost model of Safe-RLHF: higher for the less safe of two responses, and positive for an unsafe one.

Only differences of rewards matter, but a cost also needs a sign, because Safe-RLHF holds the mean cost at a limit. So a
pair has two kinds of labels: which response is safer, and whether each is safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from workers.data.dataset_files import DataError, records
from workers.data.datasets import SafetyPair, read_rows
from workers.data.tokenizer import Tokenizer
from workers.finetune.loop import OnStep, OnWarning, load_trainable, optimize
from workers.finetune.output import Output
from workers.finetune.reward_model import HELDOUT_ACCURACY, PAIR, fit_pairs, pair_accuracy, pair_scores
from workers.finetune.settings import RewardModelSettings
from workers.parallel.model import MicroLoss
from workers.settings import Chat
from workers.training.micro_batches import MicroBatch
from workers.training.models import sequence_scores
from workers.training.outputs import Outputs

HELDOUT_SIGN_ACCURACY = "heldout_sign_accuracy"


class NumberedPair(msgspec.Struct, frozen=True):
    """A safety pair in the form of PKU-SafeRLHF: responses 0 and 1, and the number of the safer one."""

    prompt: str
    response_0: str
    response_1: str
    safer_response_id: int
    is_response_0_safe: bool | None = None
    is_response_1_safe: bool | None = None
    is_chat: bool = False

    def ordered(self, place: str) -> SafetyPair:
        """The pair with the safer response first. Raises DataError for a number that is neither 0 nor 1."""
        first, second = (self.response_0, self.is_response_0_safe), (self.response_1, self.is_response_1_safe)
        if self.safer_response_id not in (0, 1):
            raise DataError(f"{place}: safer_response_id = {self.safer_response_id}: want 0 or 1")
        (safer, is_safe), (other, other_is_safe) = (second, first) if self.safer_response_id else (first, second)
        return SafetyPair(self.prompt, safer, other, is_safe, other_is_safe, is_chat=self.is_chat)


def read_pairs(path: str, columns: Mapping[str, str], model: str, chat: Chat = Chat()) -> list[SafetyPair]:  # noqa: B008 - frozen
    """The pairs of a file; its first row tells which of the two forms it has. Raises DataError."""
    first = next(iter(records(path)), None)
    if columns or first is None or "safer_response_id" not in first.values:
        return read_rows(path, SafetyPair, columns, model, chat)
    rows = read_rows(path, NumberedPair, columns, model, chat)
    return [row.ordered(f"{path}: row {number}") for number, row in enumerate(rows, 1)]


class CostModelResult(msgspec.Struct, frozen=True):
    """The result of cost-model training."""

    output: str  # transformers folder: sequence classification with one label
    losses: list[float]  # of each step, nats
    # Share of held-out pairs whose safer response has the lower cost, a tie counting half; None: no held-out pairs.
    heldout_accuracy: float | None
    heldout_sign_accuracy: float | None  # share of labelled responses whose cost has the right sign; None: no labels
    skipped: int = 0  # pairs that are longer than the model's context and were left out, held-out ones too


def train_cost_model(
    settings: RewardModelSettings, *, on_step: OnStep | None = None, on_warning: OnWarning | None = None
) -> CostModelResult:
    """Train a cost model on pairs, evaluate it on held-out ones and write it as a folder (`workers.finetune.output`).

    `on_step(step, loss)` is called after every step, from 0; `on_warning(text)` before the model loads. Raises
    DataError for unusable data and FileExistsError for an existing output, both before the model loads.
    """
    output = Output(settings.output)
    rows = _pairs(settings, settings.data)
    heldout_rows = _pairs(settings, settings.heldout) if settings.heldout else []
    if not signs_of(rows).any():
        raise DataError(f"{settings.data}: no row says whether a response is safe (chosen_is_safe, rejected_is_safe)")
    tokenizer = Tokenizer(settings.model)
    fitted = fit_pairs(tokenizer, rows, settings.data, settings, on_warning)
    pairs, labels, skipped = fitted.rows, signs_of([rows[row] for row in fitted.kept]), fitted.skipped
    heldout, heldout_labels = None, signs_of([])
    if heldout_rows:
        fitted = fit_pairs(tokenizer, heldout_rows, settings.heldout, settings, on_warning)
        heldout, heldout_labels = fitted.rows, signs_of([heldout_rows[row] for row in fitted.kept])
        skipped += fitted.skipped
    trained = load_trainable(settings, "score")
    output.begin()

    def evaluate() -> dict[str, float]:
        assert heldout is not None
        costs = pair_scores(trained.model, heldout, settings.schedule.tokens_per_micro_batch)
        found = {HELDOUT_ACCURACY: pair_accuracy(-costs)}
        if (signs := sign_accuracy_of(costs, heldout_labels)) is not None:
            found[HELDOUT_SIGN_ACCURACY] = signs
        return found

    curve = optimize(
        trained,
        pairs,
        settings.schedule,
        lambda rows: cost_loss(labels[rows]),
        output,
        evaluate=evaluate if heldout is not None else None,
        evaluate_every=settings.evaluate_every,
        on_step=on_step,
        together=PAIR,
    )
    results = {"final_loss": curve.losses[-1]} | curve.heldout
    output.finish(trained, results | {"rows_skipped": skipped})
    accuracy, signs = results.get(HELDOUT_ACCURACY), results.get(HELDOUT_SIGN_ACCURACY)
    return CostModelResult(settings.output, curve.losses, accuracy, signs, skipped)


def _pairs(settings: RewardModelSettings, path: str) -> list[SafetyPair]:
    return read_pairs(path, settings.columns, settings.model, settings.chat)


def signs_of(pairs: Sequence[SafetyPair]) -> npt.NDArray[np.float32]:
    """The sign that each response's cost should have, [2 N] like `tokenized_pairs`: 1 unsafe, -1 safe, 0 unlabelled."""
    labels = [is_safe for pair in pairs for is_safe in (pair.chosen_is_safe, pair.rejected_is_safe)]
    return np.array([0.0 if is_safe is None else -1.0 if is_safe else 1.0 for is_safe in labels], np.float32)


def cost_loss(labels: npt.NDArray[np.float32]) -> MicroLoss:
    """Mean over a batch's pairs of -log sigmoid(c - s) - log sigmoid(S_s s) - log sigmoid(S_c c); micro-batches add up.

    s and c are the costs of the safer response and of the other, S their signs (Dai et al. 2024, the cost model's
    loss), which `labels` [2 n] has. A response without a label has no sign term.
    """

    def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
        costs, signs = sequence_scores(outputs, micro), micro.tensor(labels[micro.rows])
        of_signs = torch.where(signs == 0.0, 0.0, logsigmoid(signs * costs))
        safer, other = costs.view(-1, PAIR).unbind(1)
        return -(logsigmoid(other - safer).sum() + of_signs.sum()) / (len(labels) // PAIR)

    return loss


def sign_accuracy_of(costs: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> float | None:
    """Share of labelled responses whose cost, [N, 2], has the right sign, 0 counting as safe; None without labels."""
    labelled = labels != 0.0
    return float(((costs.ravel() > 0.0) == (labels > 0.0))[labelled].mean()) if labelled.any() else None
