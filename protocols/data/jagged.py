"""A jagged column: N rows of different length in one flat array.

Nothing here pads: workers pad or pack for their device, messages never do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LONG_ROW = 128  # mean values per row from which one copy per row beats one index per value (measured, 1 to 4 bytes)


def frozen_view(array: Array) -> Array:
    """A read-only view, because a decoded column may be memory shared with other readers."""
    view = array.view()
    view.flags.writeable = False
    return view


class Jagged:
    """N rows of different length, read-only: row i is `values[offsets[i]:offsets[i + 1]]`, offsets int64 [N + 1]."""

    __slots__ = ("offsets", "values")

    def __init__(self, values: Array, offsets: Array) -> None:
        if values.ndim != 1 or offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) == 0:
            raise ValueError(
                "jagged column needs flat values and int64 offsets [N + 1], got "
                f"values {values.dtype}{list(values.shape)}, offsets {offsets.dtype}{list(offsets.shape)}"
            )
        if offsets[0] != 0 or offsets[-1] != len(values) or bool((offsets[1:] < offsets[:-1]).any()):
            raise ValueError(f"jagged offsets must rise from 0 to {len(values)}, got {offsets[0]} to {offsets[-1]}")
        self.values = frozen_view(values)
        self.offsets = frozen_view(offsets)

    @classmethod
    def from_rows(cls, rows: Iterable[npt.ArrayLike], dtype: npt.DTypeLike | None = None) -> Jagged:
        """Build from one array per row. Without rows, the type is `dtype`, by default float32."""
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        lengths = np.fromiter((len(a) for a in arrays), dtype=np.int64, count=len(arrays))
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype or np.float32)
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_lengths(cls, values: Array, lengths: npt.ArrayLike) -> Jagged:
        """Build from flat values and the length of each row."""
        counts = np.asarray(lengths, dtype=np.int64)
        offsets = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        return cls(values, offsets)

    @classmethod
    def gather(cls, values: Array, starts: npt.NDArray[np.int64], lengths: npt.NDArray[Any]) -> Jagged:
        """Copy rows out of flat values: row i is the `lengths[i]` values from `starts[i]`; rows may overlap."""
        ends = np.cumsum(lengths, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        if total > _LONG_ROW * len(lengths):
            slices = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
            return cls.from_lengths(np.concatenate([values[start:stop] for start, stop in slices]), lengths)
        index = np.arange(total) + np.repeat(starts - ends + lengths, lengths)
        return cls.from_lengths(values[index], lengths)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Jagged:
        """One UTF-8 row per text."""
        return cls.from_rows([np.frombuffer(t.encode(), dtype=np.uint8) for t in texts], dtype=np.uint8)

    def text(self, row: int) -> str:
        """Row `row` of a UTF-8 column as text."""
        return bytes(self[row]).decode()

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Length of each row, int64 [N]."""
        return self.offsets[1:] - self.offsets[:-1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        rows = len(self.offsets) - 1
        if not -rows <= row < rows:
            raise IndexError(f"row {row} of a jagged column of {rows} rows")
        row %= rows
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Jagged)
            and self.dtype == other.dtype
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Jagged({self.dtype}, {len(self)} rows, {len(self.values)} values)"

    def take(self, rows: npt.ArrayLike) -> Jagged:
        """The given rows in the given order. A rising run of adjacent rows shares memory."""
        index = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[index]
        if len(index) and index[0] >= 0 and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            start, stop = self.offsets[index[0]], self.offsets[index[-1] + 1]
            return Jagged.from_lengths(self.values[start:stop], lengths)
        return Jagged.gather(self.values, self.offsets[:-1][index], lengths)

    @staticmethod
    def concat(columns: Sequence[Jagged]) -> Jagged:
        """All rows of all columns, in order."""
        return Jagged.from_lengths(
            np.concatenate([c.values for c in columns]), np.concatenate([c.lengths for c in columns])
        )

    def with_values(self, values: Array) -> Jagged:
        """The same rows with other values, e.g. an advantage per token of a response."""
        return Jagged(values, self.offsets)
