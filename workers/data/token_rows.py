"""Tokenized prompts and responses, the input of a forward pass. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from protocols.data.jagged import Jagged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sequences(Protocol):
    """Any message with prompts and responses."""

    @property
    def prompts(self) -> Jagged: ...
    @property
    def responses(self) -> Jagged: ...


@dataclass(frozen=True, slots=True)
class TokenRows:
    """N prompts with one response each; nothing else is known of them."""

    prompts: Jagged  # int32
    responses: Jagged  # int32

    @classmethod
    def of(cls, prompts: Iterable[npt.ArrayLike], responses: Iterable[npt.ArrayLike]) -> TokenRows:
        """Build from one array per row."""
        return cls(Jagged.from_rows(prompts, np.int32), Jagged.from_rows(responses, np.int32))

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: npt.NDArray[np.int64]) -> TokenRows:
        """The given rows in the given order."""
        return TokenRows(self.prompts.take(rows), self.responses.take(rows))


def tokenized(tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, str, bool]]) -> TokenRows:
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
    return TokenRows.of(prompt_ids, answers)


def _split_text(text: list[int], bos: int | None) -> tuple[list[int], list[int]]:
    """The context token of a plain text, and its tokens that are predicted."""
    return ([bos], text) if bos is not None and text[:1] != [bos] else (text[:1], text[1:])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
