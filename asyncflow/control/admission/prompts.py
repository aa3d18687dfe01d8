"""The prompts of a run: the rows of a data file, shuffled once an epoch, each with a deterministic id.

The permutation of an epoch depends on (run seed, epoch) alone. So one number, the cursor, says where a run stands, and
no random generator has to be saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from protocols.data.ids import BASELINE_INDEX, EVALUATION_EPOCH, prompt_id, prompt_of, sample_id
from protocols.data.ids import place_of as place_of_prompt
from protocols.data.jagged import Jagged
from protocols.data.messages import Prompts


class DataRow(msgspec.Struct, frozen=True):
    """One row of the data file."""

    prompt: str
    reference: str
    columns: dict[str, Any] = {}  # name -> JSON value of the row's columns that rules ask for (`read_rows`, keep)


class PromptSource:
    """Tokenized prompts, and the order in which they are admitted.

    Raises ValueError for a tokenizer that can't be read and for a row whose prompt has no token.
    """

    def __init__(self, rows: list[DataRow], tokenizer_folder: str, seed: int) -> None:
        tokenizer = _tokenizer(Path(tokenizer_folder) / "tokenizer.json")
        self.rows = rows
        encoded = tokenizer.encode_batch([r.prompt for r in rows], add_special_tokens=False)
        self._tokens = [np.array(e.ids, np.int32) for e in encoded]
        if empty := [number for number, tokens in enumerate(self._tokens, 1) if not len(tokens)]:
            raise ValueError(f"row {empty[0]} has an empty prompt")
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        """The length of the longest prompt, in tokens."""
        return max(len(t) for t in self._tokens)

    def at(self, cursor: int) -> int:
        """The id of the prompt at a cursor, which counts admitted prompts from 0 over all epochs.

        Raises ValueError after the last epoch that the ids of training rows can hold.
        """
        epoch, position = divmod(cursor, len(self.rows))
        if epoch >= EVALUATION_EPOCH:
            raise ValueError(f"prompt {cursor} is in epoch {epoch} of {len(self)} rows; ids end at {EVALUATION_EPOCH}")
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self.rows)))
        return prompt_id(epoch, int(self._order[1][position]))

    def requests(self, prompts: list[int], samples_per_prompt: int, min_version: int) -> Prompts:
        """One row for each sample of the given prompts, admitted at version `min_version`."""
        return self._rows_of([sample_id(p, i) for p in prompts for i in range(samples_per_prompt)], min_version)

    def baselines(self, prompts: list[int], min_version: int) -> Prompts:
        """One greedy row for each prompt."""
        return self._rows_of([sample_id(p, BASELINE_INDEX) for p in prompts], min_version)

    def evaluation(self, min_version: int, limit: int) -> Prompts:
        """One evaluation row for each of the first `limit` rows of the file (0: all)."""
        count = min(limit or len(self), len(self))
        return self._rows_of([sample_id(prompt_id(EVALUATION_EPOCH, i), 0) for i in range(count)], min_version)

    def _rows_of(self, samples: list[int], min_version: int) -> Prompts:
        rows = [place_of_prompt(prompt_of(s))[1] for s in samples]
        return Prompts(
            sample_ids=np.array(samples, np.int64),
            prompts=Jagged.from_rows([self._tokens[r] for r in rows], np.int32),
            references=Jagged.from_texts([self.rows[r].reference for r in rows]),
            min_versions=np.full(len(samples), min_version, np.int64),
        )


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"tokenizer {path} can't be read: {error}") from error
