"""What generation has to know of a model's tokens: which end a response, which exist, and what text they are."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from workers.data.hf_folder import end_tokens_of
from workers.data.tokenizer import Tokenizer


class Vocabulary:
    """The tokens of a transformers folder.

    A model has often more rows than its tokenizer has tokens, since a size that divides well is faster. Such an id has
    no text, and no other program can read it: it is never sampled.
    """

    def __init__(self, ends: frozenset[int], folder: str | Path = "") -> None:
        """`ends` end a response. Without a folder, or a tokenizer.json in it, all ids are known and no text is."""
        self.ends = ends
        self._unknown: dict[int, list[int]] = {}
        self._folder = Path(folder) if folder else None

    @classmethod
    def of(cls, folder: str | Path) -> Vocabulary:
        """Raises ValueError where the folder's files name no end token."""
        return cls(end_tokens_of(folder), folder)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None without one."""
        return (
            Tokenizer(self._folder) if self._folder is not None and (self._folder / "tokenizer.json").exists() else None
        )

    def unknown(self, rows: int) -> list[int]:
        """The ids below `rows`, the size of the model's output, that stand for no token."""
        if rows not in self._unknown:
            known = range(rows) if self.tokenizer is None else self.tokenizer.vocabulary.values()
            self._unknown[rows] = sorted(set(range(rows)).difference(known, self.ends))
        return self._unknown[rows]


ALL_TOKENS = Vocabulary(frozenset())
