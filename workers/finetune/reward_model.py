"""The reward model: trained so that the better of two responses has the higher score (Bradley and Terry, 1952)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import logsigmoid

from workers.data.datasets import Preference, SafetyPair, read_rows
from workers.data.token_rows import Text, TokenRows, tokenized
from workers.data.tokenizer import Tokenizer
from workers.finetune.lengths import Fitted, fit_to_context
from workers.finetune.loop import OnStep, OnWarning, load_trainable, optimize
from workers.finetune.output import RESULTS, Output
from workers.finetune.settings import RewardModelSettings
from workers.parallel.model import MicroLoss, ParallelModel
from workers.training.micro_batches import MicroBatch
from workers.training.models import sequence_scores
from workers.training.outputs import Outputs

HELDOUT_ACCURACY = "heldout_pair_accuracy"  # its name in a folder's results
PAIR = 2  # successive rows of a pair: the chosen response, then the rejected one


class RewardModelResult(msgspec.Struct, frozen=True):
    """The result of reward-model training."""

    output: str  # transformers folder: sequence classification with one label
    losses: list[float]  # of each step, nats
    # Share of held-out pairs whose chosen response has the higher score, a tie counting half; None: no held-out pairs.
    heldout_accuracy: float | None
    skipped: int = 0  # pairs that are longer than the model's context and were left out, held-out ones too


def train_reward_model(
    settings: RewardModelSettings, *, on_step: OnStep | None = None, on_warning: OnWarning | None = None
) -> RewardModelResult:
    """Train a reward model on pairs, evaluate it on held-out ones and write it as a folder (`workers.finetune.output`).

    `on_step(step, loss)` is called after every step, from 0; `on_warning(text)` before the model loads. Raises
    DataError for unusable data and FileExistsError for an existing output, both before the model loads.
    """
    output, budget = Output(settings.output), settings.schedule.tokens_per_micro_batch
    rows = _pairs(settings, settings.data)
    heldout_rows = _pairs(settings, settings.heldout) if settings.heldout else []
    tokenizer = Tokenizer(settings.model)
    fitted = fit_pairs(tokenizer, rows, settings.data, settings, on_warning)
    pairs, heldout, skipped = fitted.rows, None, fitted.skipped
    if heldout_rows:
        fitted = fit_pairs(tokenizer, heldout_rows, settings.heldout, settings, on_warning)
        heldout, skipped = fitted.rows, skipped + fitted.skipped
    trained = load_trainable(settings, "score")
    output.begin()

    def loss_of(rows: npt.NDArray[np.int64]) -> MicroLoss:
        return pair_loss(len(rows) // PAIR, settings.centring)

    def evaluate() -> dict[str, float]:
        assert heldout is not None
        return {HELDOUT_ACCURACY: pair_accuracy(pair_scores(trained.model, heldout, budget))}

    curve = optimize(
        trained,
        pairs,
        settings.schedule,
        loss_of,
        output,
        evaluate=evaluate if heldout is not None else None,
        evaluate_every=settings.evaluate_every,
        on_step=on_step,
        together=PAIR,
    )
    results = {"final_loss": curve.losses[-1]} | curve.heldout
    output.finish(trained, results | {"rows_skipped": skipped})
    return RewardModelResult(settings.output, curve.losses, results.get(HELDOUT_ACCURACY), skipped)


def _pairs(settings: RewardModelSettings, path: str) -> list[Preference]:
    return read_rows(path, Preference, settings.columns, settings.model, settings.chat)


def heldout_accuracy_of(folder: str | Path) -> float | None:
    """The held-out accuracy that `train_reward_model` wrote into the folder, None where it had no held-out pairs."""
    found = json.loads((Path(folder) / RESULTS).read_text()).get(HELDOUT_ACCURACY)
    return None if found is None else float(found)


def tokenized_pairs(tokenizer: Tokenizer, pairs: Sequence[Preference | SafetyPair], where: str | Path) -> TokenRows:
    """N pairs of the file `where` as 2 N rows of tokens: the chosen response of each, then the rejected one."""
    texts: list[Text] = []
    for pair in pairs:
        texts.append(Text(pair.prompt, pair.chosen, pair.chosen_truncated, pair.is_chat))
        texts.append(Text(pair.prompt, pair.rejected, pair.rejected_truncated, pair.is_chat))
    return tokenized(tokenizer, texts, where, PAIR)


def fit_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[Preference | SafetyPair],
    path: str,
    settings: RewardModelSettings,
    on_warning: OnWarning | None,
) -> Fitted:
    """The tokens of the pairs of a file whose responses both fit the model's context.

    Raises DataError, see `fit_to_context`.
    """
    hint = "overlong = 'skip', which leaves these pairs out"
    fitted = fit_to_context(
        tokenized_pairs(tokenizer, pairs, path), settings.overlong, path, settings.model, PAIR, hint
    )
    if fitted.warning and on_warning:
        on_warning(fitted.warning)
    return fitted


def pair_loss(pairs: int, centring: float) -> MicroLoss:
    """Mean over a batch's pairs of -log sigmoid(c - r) + centring * (c + r)^2; micro-batches add up to it.

    c and r are the scores of the chosen and the rejected response. The second term (Eisenstein et al. 2023) fixes the
    level of the scores, which differences alone leave free.
    """

    def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
        chosen, rejected = sequence_scores(outputs, micro).view(-1, PAIR).unbind(1)
        return (-logsigmoid(chosen - rejected) + centring * (chosen + rejected).square()).sum() / pairs

    return loss


def pair_scores(model: ParallelModel, pairs: TokenRows, budget: int) -> npt.NDArray[np.float32]:
    """The scores of N pairs, [N, 2]; `budget` is in padded tokens a micro-batch."""
    scores = model.outputs(pairs, budget, sequence_scores, per_row=True)
    assert scores is not None, "one device holds the last stage"
    return scores.reshape(-1, PAIR)


def pair_accuracy(scores: npt.NDArray[np.float32]) -> float:
    """Share of pairs whose chosen response has the higher score, from scores [N, 2]; a tie counts half."""
    chosen, rejected = scores.T
    return float((chosen > rejected).mean() + 0.5 * (chosen == rejected).mean())
