"""Tokenized prompts and responses, the input of a forward pass. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from protocols.data.jagged import Jagged
from workers.data.chat import ChatTemplate
from workers.data.dataset_files import DataError, places_of
from workers.data.hf_folder import vocabulary_of
from workers.data.tokenizer import Tokenizer, Tokens


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


class Text(NamedTuple):
    """A prompt and a response to tokenize; a plain text has an empty prompt."""

    prompt: str
    response: str
    truncated: bool = False  # the response was cut off by a token limit and gets no end token
    is_chat: bool = False  # rendered by the chat template, which wrote the special tokens before the response


def tokenized(tokenizer: Tokenizer, texts: Sequence[Text], where: str | Path = "", per_row: int = 1) -> TokenRows:
    """The tokens of N texts. The prompt of a plain text is its first token, which is BOS where the model wants one.

    A response that is not truncated ends with its end token: in a chat the token that ends a turn in the template,
    else the eos token. Raises DataError for a token beyond the rows of the folder's model; it names the place in the
    file `where`, of which each row has `per_row` texts.
    """
    prompts: list[Tokens] = []
    responses: list[Tokens] = []
    for prompt, response in token_pairs(tokenizer, texts):
        prompts.append(prompt if len(prompt) else response[:1])
        responses.append(response if len(prompt) else response[1:])
    for rows in (prompts, responses):
        if found := unknown_to_model(tokenizer, rows):
            (place,) = places_of(where, [found[0] // per_row])
            raise DataError(f"{place}: {found[1]}")
    return TokenRows.of(prompts, responses)


def token_pairs(tokenizer: Tokenizer, texts: Sequence[Text]) -> Iterator[tuple[Tokens, Tokens]]:
    """(prompt, response) of each text, with the end of the response; a plain text is a response after no prompt."""
    asked = [text.prompt for text in texts]
    prompts = tokenizer.encode(asked)
    responses = tokenizer.continuations(asked, prompts, [text.response for text in texts])
    end_of_turn = end_of_turns(tokenizer) if any(text.is_chat for text in texts) else tokenizer.eos
    for text, prompt, response in zip(texts, prompts, responses, strict=True):
        end = end_of_turn if text.is_chat else tokenizer.eos
        ended = response if text.truncated else np.append(response, np.int32(end))
        if text.is_chat:
            yield prompt, ended
        else:
            yield tokenizer.started(prompt), ended if len(prompt) else tokenizer.started(ended)


def end_of_turns(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a turn of a conversation; the eos token where the template writes none."""
    token = ChatTemplate(tokenizer.folder).end_of_turn
    number = tokenizer.id_of(token) if token else None
    return tokenizer.eos if number is None else number


def unknown_to_model(tokenizer: Tokenizer, rows: Iterable[Tokens]) -> tuple[int, str] | None:
    """The first of the rows that has a token beyond the vocabulary of the folder's model, and the complaint."""
    vocabulary = vocabulary_of(tokenizer.folder)
    if vocabulary is None or tokenizer.size <= vocabulary:
        return None
    for row, tokens in enumerate(rows):
        if len(tokens) and (largest := int(tokens.max())) >= vocabulary:
            return row, (
                f"the token {tokenizer.token_of(largest)!r} has id {largest}, and the model of {tokenizer.folder} has "
                f"{vocabulary} rows of vocabulary, ids 0 to {vocabulary - 1}: want its own tokenizer, or a model whose "
                "embedding was resized to this one"
            )
    return None


def response_column(responses: Jagged, mask: Jagged, values: npt.NDArray[np.float32]) -> Jagged:
    """Values of the response tokens as a column; one of a masked token that is not finite becomes 0.

    A message holds finite numbers only, and a masked token may have a log-prob of -inf, which nothing reads. Of a
    trained token it is an error, which the message reports.
    """
    masked = (mask.values == 0) & ~np.isfinite(values)
    return responses.with_values(np.where(masked, np.float32(0.0), values) if masked.any() else values)
