"""The prompts of a run: the tokenized rows of its data sets, each with a deterministic id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from asyncflow.control.admission.prompt_order import PromptOrder
from protocols.data.ids import BASELINE_INDEX, EVALUATION_EPOCH, prompt_id, prompt_of, sample_id
from protocols.data.jagged import Jagged
from protocols.data.messages import Prompts
from workers.data.token_rows import unknown_to_model
from workers.data.tokenizer import Tokenizer


class DataRow(msgspec.Struct, frozen=True):
    """One row of the data file."""

    prompt: str
    reference: str
    columns: dict[str, Any] = {}  # name -> JSON value of the row's columns that rules ask for (`read_rows`, keep)
    is_chat: bool = False  # rendered by the chat template, which wrote the special tokens


class Share(msgspec.Struct, frozen=True):
    """A data set among several."""

    rows: int
    weight: float  # its prompts relative to those of the other sets


class BadRow(ValueError):
    """A row whose prompt can't be used: its number, counted from 0 over all sets, and why."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row + 1}: {why}")
        self.row, self.why = row, why


class PromptSource:
    """Tokenized prompts of one or several data sets, and the order in which they are admitted.

    Raises ValueError for a tokenizer that can't be read, and BadRow for a row whose prompt has no token, or has a token
    that the folder's model does not have.
    """

    def __init__(self, rows: list[DataRow], tokenizer_folder: str, seed: int, shares: Sequence[Share] = ()) -> None:
        """`shares` divides the rows into data sets, in order; without them all rows are one set."""
        self.rows, self._seed = rows, seed
        tokenizer = Tokenizer(tokenizer_folder)
        encoded = tokenizer.prompts([row.prompt for row in rows], [row.is_chat for row in rows])
        if found := unknown_to_model(tokenizer, encoded):
            raise BadRow(*found)
        self._tokens = Jagged.from_rows(encoded, np.int32)
        if len(empty := np.flatnonzero(self.lengths == 0)):
            raise BadRow(int(empty[0]), "its prompt is empty")
        self.shares = list(shares) or [Share(len(rows), 1.0)]
        self.leave_out(np.empty(0, np.int64))

    def leave_out(self, rows: npt.NDArray[np.int64]) -> None:
        """Admit and evaluate all rows but these. Raises ValueError if no row of a set is left."""
        self._kept = np.setdiff1d(np.arange(len(self.rows)), rows)
        ends = np.cumsum([share.rows for share in self.shares])
        sets = np.split(self._kept, np.searchsorted(self._kept, ends[:-1]))
        if empty := [number for number, kept in enumerate(sets) if not len(kept)]:
            raise ValueError(f"none of the {self.shares[empty[0]].rows} rows is left")
        self._order = PromptOrder(self._seed, sets, [share.weight for share in self.shares], len(self.rows))

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The length of each row's prompt in tokens, int64 [N], also of rows that are left out."""
        return self._tokens.lengths

    @property
    def longest(self) -> int:
        """The length of the longest prompt that is admitted, in tokens."""
        return int(self.lengths[self._kept].max())

    def at(self, cursor: int) -> int:
        """The id of the prompt at a cursor, which counts admitted prompts from 0."""
        return self._order.prompt_at(cursor)

    def requests(self, prompts: list[int], samples_per_prompt: int, min_version: int) -> Prompts:
        """One row for each sample of the given prompts, admitted at version `min_version`."""
        return self._rows_of([sample_id(p, i) for p in prompts for i in range(samples_per_prompt)], min_version)

    def baselines(self, prompts: list[int], min_version: int) -> Prompts:
        """One greedy row for each prompt."""
        return self._rows_of([sample_id(p, BASELINE_INDEX) for p in prompts], min_version)

    def evaluation(self, min_version: int, limit: int, samples: int = 1, first: int = 0) -> Prompts:
        """`samples` evaluation rows for each of the first `limit` rows of the file (0: all).

        The file's first row has the ordinal `first`: a run with several held-out files counts through all of them.
        """
        rows = self._kept[: limit or len(self)].repeat(samples).tolist()
        ids = [sample_id(prompt_id(EVALUATION_EPOCH, first + row), i % samples) for i, row in enumerate(rows)]
        return self._of(rows, ids, min_version)

    def first(self) -> Prompts:
        """One row for the first prompt, to try something out on it."""
        return self.evaluation(0, 1)

    def _rows_of(self, samples: list[int], min_version: int) -> Prompts:
        return self._of([self._order.row_of(prompt_of(s)) for s in samples], samples, min_version)

    def _of(self, rows: list[int], samples: list[int], min_version: int) -> Prompts:
        return Prompts(
            sample_ids=np.array(samples, np.int64),
            prompts=self._tokens.take(rows),
            references=Jagged.from_texts([self.rows[r].reference for r in rows]),
            min_versions=np.full(len(samples), min_version, np.int64),
            columns=Jagged.from_texts([self._columns_of(r) for r in rows]),
        )

    def _columns_of(self, row: int) -> str:
        """The columns that rules ask for as JSON; "" where none does."""
        columns = self.rows[row].columns
        return msgspec.json.encode(columns).decode() if columns else ""
