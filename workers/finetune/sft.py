"""Supervised fine-tuning: maximize the likelihood of demonstrated responses, including their end of sequence."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedModel

from workers.data.datasets import Demonstration, read_rows
from workers.finetune.loop import OnStep, load_tokenizer, optimize, refuse_existing, save_folder, tokenized
from workers.finetune.settings import SftSettings
from workers.training.micro_batches import Sequences, micro_batches
from workers.training.models import load_causal, token_log_probs


class SftResult(msgspec.Struct, frozen=True):
    """The result of supervised fine-tuning."""

    output: str  # transformers folder
    losses: list[float]  # of each step: mean negative log-likelihood of a response token, nats


def train_sft(settings: SftSettings, *, on_step: OnStep | None = None) -> SftResult:
    """Fine-tune a folder's model on demonstrations and write the result as a folder.

    `on_step(step, loss)` is called after every step, from 0. Raises DataError for unusable data and FileExistsError
    for an existing output, both before the model loads.
    """
    refuse_existing(settings.output)
    rows = read_rows(settings.data, Demonstration, settings.columns, settings.model)
    tokenizer = load_tokenizer(settings.model)
    data = tokenized(tokenizer, ((row.prompt, row.response, False) for row in rows))
    model = load_causal(settings.model, settings.dtype)
    budget = settings.schedule.tokens_per_micro_batch

    def losses_of(batch: npt.NDArray[np.int64]) -> Iterator[Tensor]:
        return response_loss(model, data.take(batch), budget)

    losses = optimize(model, settings.schedule, settings.optimizer, len(data), losses_of, on_step)
    save_folder(settings.output, model, tokenizer, {"final_loss": losses[-1]})
    return SftResult(settings.output, losses)


def response_loss(model: PreTrainedModel, data: Sequences, budget: int) -> Iterator[Tensor]:
    """-mean(log p) over all response tokens of a batch, in parts of one micro-batch each that add up to it."""
    tokens = len(data.responses.values)
    return (-token_log_probs(model, batch).sum() / tokens for batch in micro_batches(data, budget))
