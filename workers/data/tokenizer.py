"""One tokenizer for every step: SFT, reward models, RL, pretraining text and rules read a folder's tokenizer.json.

transformers' AutoTokenizer rebuilds some tokenizers by their class instead of reading that file, so the ids of a step
that used it could differ from another's. Padding and truncation that the file stores are off: rows are padded where a
batch is made, and are never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers

from workers.data.hf_folder import eos_token_of, json_of, special_tokens_of

Tokens = npt.NDArray[np.int32]  # [T] ids

_BATCH = 8192  # texts in one call of the library, which holds the work of all of them


class BadTokenizer(ValueError):
    """A folder's tokenizer can't be read; the message says why and what to do."""


class Tokenizer:
    """The tokenizer.json of a transformers folder. Raises BadTokenizer where it is missing or can't be read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tokenizer = _read(self.folder)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @cached_property
    def start(self) -> tuple[int, ...]:
        """The ids that a plain text begins with: BOS where the model wants one, else none.

        They are what the file's post-processor writes, as in transformers; where it writes none, add_bos_token = true
        of tokenizer_config.json asks for BOS.
        """
        written = _start_of(_post_processor(self.folder))
        wanted = json_of(self.folder / "tokenizer_config.json").get("add_bos_token")
        bos = special_tokens_of(self.folder).get("bos_token") if wanted else None
        number = self.id_of(bos) if bos is not None else None
        return written or (() if number is None else (number,))

    @cached_property
    def eos(self) -> int:
        """The id of the token that ends a text. Raises BadTokenizer where the folder names none."""
        try:
            return eos_token_of(self.folder)
        except ValueError as error:
            raise BadTokenizer(str(error)) from error

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def size(self) -> int:
        """One more than the largest id. A model may have more rows than that, or fewer where some tokens are unused."""
        return max(self.vocabulary.values(), default=-1) + 1

    def to_json(self) -> str:
        """The tokenizer in the library's canonical form, without padding and truncation."""
        return self._tokenizer.to_str()

    def id_of(self, token: str) -> int | None:
        """The id of a token, None for an unknown one."""
        return self._tokenizer.token_to_id(token)

    def token_of(self, number: int) -> str | None:
        """The token of an id, None for an unknown one."""
        return self._tokenizer.id_to_token(number)

    def encode(self, texts: Iterable[str]) -> list[Tokens]:
        """The ids of each text without any that the tokenizer would add, such as BOS."""
        return list(self._encoded(texts))

    def prompts(self, texts: Sequence[str], rendered: Iterable[bool]) -> list[Tokens]:
        """The ids of prompts. A plain text begins with `start`, once; a rendered chat has what its template wrote.

        An empty text has no ids.
        """
        encoded = self._encoded(texts)
        return [ids if is_chat else self.started(ids) for ids, is_chat in zip(encoded, rendered, strict=True)]

    def started(self, ids: Tokens) -> Tokens:
        """The ids of a plain text with `start` before them, unless they have it; without any where there are none."""
        start = np.array(self.start, np.int32)
        return ids if not len(ids) or np.array_equal(ids[: len(start)], start) else np.concatenate([start, ids])

    def continuations(self, prompts: Sequence[str], encoded: Sequence[Tokens], texts: Sequence[str]) -> list[Tokens]:
        """The ids of each text where it follows its prompt; `encoded` are the prompts' ids of `encode`.

        They are what the text adds to the prompt's ids, since some tokenizers put a space before a text that stands
        alone. Where a token would reach over the border, the text is encoded alone: a prompt keeps its ids.
        """
        together = self._encoded(prompt + text for prompt, text in zip(prompts, texts, strict=True))
        added: list[Tokens | None] = []
        for whole, prompt in zip(together, encoded, strict=True):
            added.append(whole[len(prompt) :] if np.array_equal(whole[: len(prompt)], prompt) else None)
        alone = self._encoded(text for text, ids in zip(texts, added, strict=True) if ids is None)
        return [next(alone) if ids is None else ids for ids in added]

    def decode(self, rows: Iterable[Sequence[int] | Tokens], *, special: bool = False) -> list[str]:
        """The texts of rows of ids; `special` tokens are written as text or left out."""
        return self._tokenizer.decode_batch([list(map(int, row)) for row in rows], skip_special_tokens=not special)

    def stream(self) -> Callable[[int], str | None]:
        """Reads one response token by token: the text that each adds, with special tokens written out.

        None for a token that ends inside a character: the next ones bring it.
        """
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        return lambda token: stream.step(self._tokenizer, token)

    def _encoded(self, texts: Iterable[str]) -> Iterator[Tokens]:
        left = iter(texts)
        while batch := list(islice(left, _BATCH)):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)


def _read(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise BadTokenizer(
            f"{folder} has no tokenizer.json, the only form of a tokenizer that is read; transformers writes one: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BadTokenizer(f"tokenizer {path} can't be read: {error}") from error


# --- what the post-processor puts before a text


class _PostProcessor(msgspec.Struct):
    """The only part of a tokenizer.json that is decoded here: its vocabulary may have megabytes."""

    post_processor: dict[str, Any] | None = None


def _post_processor(folder: Path) -> dict[str, Any]:
    content = (folder / "tokenizer.json").read_bytes()
    return msgspec.json.decode(content, type=_PostProcessor).post_processor or {}


def _start_of(processor: dict[str, Any]) -> tuple[int, ...]:
    """The ids that a post-processor of the tokenizers library puts before a single text."""
    match processor:
        case {"type": "Sequence", "processors": list(processors)}:  # each adds to what the ones before it made
            return tuple(token for inner in reversed(processors) for token in _start_of(inner))
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(known)}:
            ids: list[int] = []
            for piece in pieces:
                if "SpecialToken" not in piece:
                    break
                ids += known[piece["SpecialToken"]["id"]]["ids"]
            return tuple(ids)
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, int(token)]}:
            return (token,)
        case _:
            return ()
