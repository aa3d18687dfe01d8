"""Selects rows of a frame and the blocks that hold them.

Adjacent rows are read as a view of each column; other rows are copied. Either way nothing is computed from bytes
outside the selected blocks, because only those are verified.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.frame import Indices
from protocols.data.jagged import Array, Jagged


class Selection(msgspec.Struct, frozen=True):
    """The selected rows, the blocks that hold them, and their positions among all rows of those blocks.

    The fields are slices for adjacent rows (columns are views then) and index arrays otherwise.
    """

    rows: slice | Indices  # selected, of the frame
    blocks: slice | Indices  # K, rising
    covered: slice | Indices  # every row of the blocks
    edges: Indices  # [K + 1] where the blocks begin in `covered`
    at: slice | Indices  # positions of the selected rows in `covered`

    @classmethod
    def of(cls, bounds: Indices, rows: npt.ArrayLike | None) -> Selection:
        """Select `rows` by the blocks' bounds [B + 1]. See `codec.Frame.read` for `rows` and errors."""
        wanted = _wanted(rows, int(bounds[-1]))
        if isinstance(wanted, slice):
            return cls._run(bounds, wanted.start, wanted.stop)
        blocks = np.unique(bounds.searchsorted(wanted, side="right") - 1)
        begins, sizes = bounds[blocks], bounds[blocks + 1] - bounds[blocks]
        edges = np.concatenate([[0], np.cumsum(sizes)])
        covered = np.arange(edges[-1]) + np.repeat(begins - edges[:-1], sizes)
        return cls(wanted, blocks, covered, edges, covered.searchsorted(wanted))

    @classmethod
    def _run(cls, bounds: Indices, start: int, stop: int) -> Selection:
        if start == stop:
            return cls(slice(0), slice(0), slice(0), bounds[:1], slice(0))
        blocks = slice(int(bounds.searchsorted(start, side="right")) - 1, int(bounds.searchsorted(stop)))
        edges = bounds[blocks.start : blocks.stop + 1]
        first, last = int(edges[0]), int(edges[-1])
        return cls(slice(start, stop), blocks, slice(first, last), edges - first, slice(start - first, stop - first))

    @property
    def nothing(self) -> bool:
        """Whether no row is selected."""
        return len(self.edges) == 1

    def plain(self, values: Array) -> Array:
        """The selected rows of a plain column, read-only."""
        chosen = values[self.rows]
        chosen.flags.writeable = False
        return chosen

    def jagged(self, values: Array, lengths: Array, bounds: Indices) -> Jagged:
        """The selected rows of a jagged column whose blocks begin at `bounds` [B + 1] of its values.

        Reads nothing outside the blocks. Raises ValueError if a block's row lengths do not add up to the number of
        values in the header, which no checksum compares.
        """
        begins, ends = bounds[:-1][self.blocks], bounds[1:][self.blocks]
        counts = lengths[self.covered]
        offsets = np.zeros(len(counts) + 1, np.int64)
        counts.cumsum(dtype=np.int64, out=offsets[1:])
        at_edges = offsets[self.edges]
        surplus = at_edges[1:] - at_edges[:-1] - (ends - begins)
        if surplus.any():
            wrong = int(np.flatnonzero(surplus)[0])
            block = self.blocks.start + wrong if isinstance(self.blocks, slice) else self.blocks[wrong]
            raise ValueError(
                f"block {block} has {at_edges[wrong + 1] - at_edges[wrong]} values by its rows' lengths, "
                f"{ends[wrong] - begins[wrong]} by the header"
            )
        if isinstance(self.at, slice):
            low, high = offsets[self.at.start], offsets[self.at.stop]
            shared = values[begins[0] + low : begins[0] + high]
            return Jagged(shared, offsets[self.at.start : self.at.stop + 1] - low)
        starts = offsets[:-1] + np.repeat(begins - at_edges[:-1], self.edges[1:] - self.edges[:-1])
        return Jagged.gather(values, starts[self.at], counts[self.at])


def _wanted(rows: npt.ArrayLike | None, total: int) -> slice | Indices:
    if rows is None:
        return slice(0, total)
    index = np.asarray(rows)
    if index.ndim != 1 or (len(index) and index.dtype.kind not in "iu"):
        raise ValueError(f"want flat row indices, got {index.dtype} {list(index.shape)}")
    if not len(index):
        return slice(0, 0)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= total:
        raise IndexError(f"row {low if low < 0 else high} of a frame of {total} rows")
    index = index.astype(np.int64)
    if (index[1:] == index[:-1] + 1).all():
        return slice(low, high + 1)
    ordered = np.sort(index)
    if (again := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise ValueError(f"row {again[0]} is selected twice")
    return index
