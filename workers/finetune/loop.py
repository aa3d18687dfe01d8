"""The training loop shared by SFT, reward and cost models: tokenization, row order, optimizer steps, output folder.

All randomness comes from the schedule's seed, and a loss is divided by the whole batch's denominator before it is
summed over micro-batches. So a result does not depend on how a batch is split.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from protocols.data.columns import Jagged
from workers.finetune.settings import Schedule
from workers.settings import Optimizer

RESULTS = "training.json"

OnStep = Callable[[int, float], object]


class Texts:
    """N prompts with one response each, as token columns (the `Sequences` of workers.training.models)."""

    __slots__ = ("prompts", "responses")

    def __init__(self, prompts: Jagged, responses: Jagged) -> None:
        self.prompts = prompts
        self.responses = responses

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: npt.NDArray[np.int64]) -> Texts:
        """The given rows in the given order."""
        return Texts(self.prompts.take(rows), self.responses.take(rows))


def tokenized(tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, str, bool]]) -> Texts:
    """Tokenize (prompt, response, truncated) rows; a response that is not truncated ends with the eos token.

    A row without a prompt is a plain text: its prompt is the bos token, or its own first token if the tokenizer has no
    bos token. Raises ValueError for a tokenizer without an eos token.
    """
    prompts, responses, truncated = zip(*rows, strict=True)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"tokenizer of {tokenizer.name_or_path} has no eos token: responses could never end")
    answers = [ids if cut else [*ids, eos] for ids, cut in zip(_encode(tokenizer, responses), truncated, strict=True)]
    prompt_ids, bos = _encode(tokenizer, prompts), tokenizer.bos_token_id
    for row, prompt in enumerate(prompt_ids):
        if not prompt:
            prompt_ids[row], answers[row] = _split_text(answers[row], bos if isinstance(bos, int) else None)
    return Texts(Jagged.from_rows(prompt_ids, np.int32), Jagged.from_rows(answers, np.int32))


def _split_text(text: list[int], bos: int | None) -> tuple[list[int], list[int]]:
    """The context token of a plain text, and its tokens that are predicted."""
    return ([bos], text) if bos is not None and text[:1] != [bos] else (text[:1], text[1:])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder."""
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def batches(rows: int, schedule: Schedule) -> Iterator[npt.NDArray[np.int64]]:
    """Row indices of each step, int64 [batch_size]: every epoch is a new permutation of the rows."""
    rng = np.random.Generator(np.random.PCG64(schedule.seed))
    waiting = np.empty(0, np.int64)
    for _ in range(schedule.steps):
        while len(waiting) < schedule.batch_size:
            waiting = np.concatenate([waiting, rng.permutation(rows)])
        yield waiting[: schedule.batch_size]
        waiting = waiting[schedule.batch_size :]


def lr_factor(step: int, schedule: Schedule, warmup_steps: int) -> float:
    """The learning rate of a step (from 0) as a fraction of its peak."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(schedule.steps - warmup_steps, 1)
    match schedule.decay:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 + 0.5 * math.cos(math.pi * progress)


def optimize(
    model: nn.Module,
    schedule: Schedule,
    settings: Optimizer,
    rows: int,
    losses: Callable[[npt.NDArray[np.int64]], Iterator[Tensor]],
    on_step: OnStep | None,
) -> list[float]:
    """Train and return the loss of each step. `on_step(step, loss)` is called after every step, from 0.

    `losses` yields a batch's loss in parts that add up to it, one per micro-batch; each part's graph is freed before
    the next is built. Raises FloatingPointError if a loss or the gradient's norm is not finite; the weights are then
    those of the previous step.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: lr_factor(n, schedule, settings.warmup_steps))
    step_losses: list[float] = []
    for step, batch in enumerate(batches(rows, schedule)):
        loss = 0.0
        for part in losses(batch):
            part.backward()
            loss += part.item()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}; "
                f"a learning rate of {schedule.learning_rate} may be too high"
            )
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        step_losses.append(loss)
        if on_step:
            on_step(step, loss)
    return step_losses


def refuse_existing(output: str | Path) -> None:
    """Raise FileExistsError if the output folder exists: a finished model is never overwritten."""
    if Path(output).exists():
        raise FileExistsError(f"{output} exists already: remove it, or name another output")


def save_folder(
    output: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, results: Mapping[str, float]
) -> None:
    """Write a transformers folder under a temporary name, then rename it: a folder that exists is complete.

    `results` are the training's metrics, written beside the weights as training.json.
    """
    target = Path(output)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / RESULTS).write_text(json.dumps(results, indent=2))
    partial.rename(target)
