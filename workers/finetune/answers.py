"""Greedy answers of a model in training to a few prompts, to see what fine-tuning does to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workers.data.model_config import context_in
from workers.data.tokenizer import Tokenizer, Tokens
from workers.parallel.model import ParallelModel


@torch.no_grad()
def greedy_answers(
    model: ParallelModel, prompts: Sequence[Tokens], tokenizer: Tokenizer, end_tokens: Sequence[int], max_tokens: int
) -> list[str]:
    """The texts of the most likely next tokens up to an end token or the model's context; one prompt at a time."""
    module: Any = model.module
    answers: list[list[int]] = []
    context = context_in(model.config.to_dict())
    for prompt in prompts:
        room = max_tokens if context is None else min(max_tokens, context - len(prompt))
        if room < 1:
            answers.append([])
            continue
        ids = torch.tensor(prompt[None], dtype=torch.int64, device=model.device)
        found = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=list(end_tokens),
            pad_token_id=end_tokens[0],
        )
        answers.append(found[0, len(prompt) :].tolist())
    return tokenizer.decode(answers)
