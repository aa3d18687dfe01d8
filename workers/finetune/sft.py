"""Supervised fine-tuning: maximize the likelihood of demonstrated responses, each with the token that ends it.

That is the token which ends a turn in the chat template for conversations, and the tokenizer's eos token for texts.
"""

from __future__ import annotations

import msgspec
from torch import Tensor

from workers.data.datasets import Demonstration, read_rows
from workers.data.token_rows import Sequences, Text, end_of_turns, tokenized
from workers.data.tokenizer import Tokenizer
from workers.finetune.answers import greedy_answers
from workers.finetune.dropout import refuse_without_dropout
from workers.finetune.lengths import Fitted, fit_to_context
from workers.finetune.loop import OnStep, OnWarning, load_trainable, optimize
from workers.finetune.output import Output
from workers.finetune.settings import SftSettings
from workers.parallel.model import MicroLoss
from workers.training.micro_batches import MicroBatch
from workers.training.models import response_log_probs
from workers.training.outputs import Outputs

HELDOUT_LOSS = "heldout_loss"  # its name in a folder's journal and results


class SftResult(msgspec.Struct, frozen=True):
    """The result of supervised fine-tuning."""

    output: str  # transformers folder
    losses: list[float]  # of each step: mean negative log-likelihood of a response token, nats
    heldout_loss: float | None = None  # the same of the held-out rows, after the last step; None: there are none
    skipped: int = 0  # rows that are longer than the model's context and were left out, held-out ones too
    cut: int = 0  # such rows whose response was cut short


def train_sft(
    settings: SftSettings, *, on_step: OnStep | None = None, on_warning: OnWarning | None = None
) -> SftResult:
    """Fine-tune a folder's model on demonstrations and write the result as a folder, see `workers.finetune.output`.

    `on_step(step, loss)` is called after every step, from 0; `on_warning(text)` before the model loads. Raises
    DataError for unusable data and FileExistsError for an existing output, both before the model loads, and NoDropout
    for dropout of a model that has none.
    """
    output, budget = Output(settings.output), settings.schedule.tokens_per_micro_batch
    texts = _texts(settings, settings.data)
    heldout_texts = _texts(settings, settings.heldout) if settings.heldout else []
    tokenizer = Tokenizer(settings.model)
    fitted = _fitted(settings, texts, settings.data, tokenizer)
    fitted_heldout = _fitted(settings, heldout_texts, settings.heldout, tokenizer) if heldout_texts else None
    both = [fitted, *([fitted_heldout] if fitted_heldout is not None else [])]
    for one in both:
        if one.warning and on_warning:
            on_warning(one.warning)
    data, heldout = fitted.rows, fitted_heldout.rows if fitted_heldout is not None else None
    end = end_of_turns(tokenizer) if any(text.is_chat for text in texts) else tokenizer.eos
    trained = load_trainable(settings, "tokens")
    if settings.dropout:
        refuse_without_dropout(trained.model.config, settings.model)
    output.begin()
    shown = [(heldout_texts or texts)[row] for row in both[-1].kept[: settings.samples]]
    prompts = [both[-1].rows.prompts[row] for row in range(len(shown))]

    def answers() -> list[str]:
        return greedy_answers(trained.model, prompts, tokenizer, [end], settings.sample_tokens)

    def evaluate() -> dict[str, float]:
        assert heldout is not None
        return {HELDOUT_LOSS: float(sum(trained.model.forward(heldout, budget, response_loss(heldout))))}

    before = answers()
    curve = optimize(
        trained,
        data,
        settings.schedule,
        lambda rows: response_loss(data.take(rows)),
        output,
        evaluate=evaluate if heldout is not None else None,
        evaluate_every=settings.evaluate_every,
        on_step=on_step,
        dropout=settings.dropout,
    )
    for text, old, new in zip(shown, before, answers(), strict=True):
        output.sample({"prompt": text.prompt, "demonstrated": text.response, "before": old, "after": new})
    skipped, cut = sum(one.skipped for one in both), sum(one.cut for one in both)
    results = {"final_loss": curve.losses[-1]} | curve.heldout
    output.finish(trained, results | {"rows_skipped": skipped, "rows_cut": cut}, end)
    return SftResult(settings.output, curve.losses, results.get(HELDOUT_LOSS), skipped, cut)


def _texts(settings: SftSettings, path: str) -> list[Text]:
    rows = read_rows(path, Demonstration, settings.columns, settings.model, settings.chat)
    return [Text(row.prompt, row.response, is_chat=row.is_chat) for row in rows]


def _fitted(settings: SftSettings, texts: list[Text], path: str, tokenizer: Tokenizer) -> Fitted:
    """The rows that fit the model's context. Raises DataError, see `fit_to_context`."""
    hint = "overlong = 'skip', which leaves these out, or overlong = 'cut', which ends their responses there"
    return fit_to_context(tokenized(tokenizer, texts, path), settings.overlong, path, settings.model, hint=hint)


def response_loss(batch: Sequences) -> MicroLoss:
    """-mean(log p) over all response tokens of a batch; micro-batches add up to it."""
    tokens = len(batch.responses.values)

    def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
        return -response_log_probs(outputs, micro).sum() / tokens

    return loss
