"""Supervised fine-tuning: maximize the likelihood of demonstrated responses, each with the token that ends it.

That is the token which ends a turn in the chat template for conversations, and the tokenizer's eos token for texts.
"""

from __future__ import annotations

import msgspec
from torch import Tensor

from workers.data.datasets import Demonstration, read_rows
from workers.data.token_rows import Sequences, Text, end_of_turns, tokenized
from workers.data.tokenizer import Tokenizer
from workers.finetune.lengths import fit_to_context
from workers.finetune.loop import OnStep, OnWarning, load_trainable, optimize, refuse_existing, save_folder
from workers.finetune.settings import SftSettings
from workers.parallel.model import MicroLoss
from workers.training.micro_batches import MicroBatch
from workers.training.models import response_log_probs


class SftResult(msgspec.Struct, frozen=True):
    """The result of supervised fine-tuning."""

    output: str  # transformers folder
    losses: list[float]  # of each step: mean negative log-likelihood of a response token, nats
    skipped: int = 0  # rows that are longer than the model's context and were left out
    cut: int = 0  # such rows whose response was cut short


def train_sft(
    settings: SftSettings, *, on_step: OnStep | None = None, on_warning: OnWarning | None = None
) -> SftResult:
    """Fine-tune a folder's model on demonstrations and write the result as a folder.

    `on_step(step, loss)` is called after every step, from 0; `on_warning(text)` before the model loads. Raises
    DataError for unusable data and FileExistsError for an existing output, both before the model loads.
    """
    refuse_existing(settings.output)
    rows = read_rows(settings.data, Demonstration, settings.columns, settings.model, settings.chat)
    tokenizer = Tokenizer(settings.model)
    texts = [Text(row.prompt, row.response, is_chat=row.is_chat) for row in rows]
    data = tokenized(tokenizer, texts, settings.data)
    hint = "overlong = 'skip', which leaves these out, or overlong = 'cut', which ends their responses there"
    fitted = fit_to_context(data, settings.overlong, settings.data, settings.model, hint=hint)
    data = fitted.rows
    if fitted.warning and on_warning:
        on_warning(fitted.warning)
    end = end_of_turns(tokenizer) if any(row.is_chat for row in rows) else tokenizer.eos
    trained = load_trainable(settings, "tokens")
    losses = optimize(trained, data, settings.schedule, lambda rows: response_loss(data.take(rows)), on_step)
    results = {"final_loss": losses[-1], "rows_skipped": fitted.skipped, "rows_cut": fitted.cut}
    save_folder(settings.output, trained, results, end)
    return SftResult(settings.output, losses, fitted.skipped, fitted.cut)


def response_loss(batch: Sequences) -> MicroLoss:
    """-mean(log p) over all response tokens of a batch; micro-batches add up to it."""
    tokens = len(batch.responses.values)

    def loss(logits: Tensor, micro: MicroBatch) -> Tensor:
        return -response_log_probs(logits, micro).sum() / tokens

    return loss
