"""Row plans: which segments of which shards a rank reads, for any pair of topologies.

The producing service writes one shard per collected rank, and `Located` records the shard and row of every row. The
consuming service partitions the rows by its own transfer protocol; `Located.segments` then gives the reads of one
rank. Neither side knows the other's topology, and only row numbers are handled here.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.partition import Rows


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Rows [start, stop) of shard `source`: one contiguous read."""

    source: int
    start: int
    stop: int

    def __len__(self) -> int:
        """Number of rows, at least 1 in any plan."""
        return self.stop - self.start


class Located(msgspec.Struct, frozen=True, eq=False):  # noqa: PLW1641 - rows have no hash
    """The location of each of N rows: `sources` int64 [N], the shard, and `rows` int64 [N], the row in that shard.

    Raises ValueError for arrays of another form and for negative numbers.
    """

    sources: Rows
    rows: Rows

    def __post_init__(self) -> None:
        for name, array in (("sources", self.sources), ("rows", self.rows)):
            if array.ndim != 1 or array.dtype != np.int64:
                raise ValueError(f"located {name}: want int64 [rows], got {array.dtype} {list(array.shape)}")
            if len(array) and int(array.min()) < 0:
                raise ValueError(f"located {name}: {int(array.min())} at row {int(array.argmin())}, want 0 or more")
        if len(self.sources) != len(self.rows):
            raise ValueError(f"located: {len(self.sources)} sources for {len(self.rows)} rows, want one each")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Located):
            return NotImplemented
        return np.array_equal(self.sources, other.sources) and np.array_equal(self.rows, other.rows)

    def segments(self, index: npt.ArrayLike) -> list[Segment]:
        """The segments whose concatenation is the rows at `index`, in order.

        Adjacent rows of one shard are merged into one segment. Raises ValueError for an index that is not flat
        integers, IndexError for a row out of range.
        """
        wanted = np.asarray(index)
        if wanted.ndim != 1 or (len(wanted) and wanted.dtype.kind not in "iu"):
            raise ValueError(f"want flat row indices, got {wanted.dtype} {list(wanted.shape)}")
        if not len(wanted):
            return []
        if not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(f"rows {int(wanted.min())} to {int(wanted.max())} are wanted of {len(self)} located ones")
        sources, rows = self.sources[wanted], self.rows[wanted]
        breaks = np.flatnonzero((sources[1:] != sources[:-1]) | (rows[1:] != rows[:-1] + 1))
        firsts, lasts = np.append(0, breaks + 1), np.append(breaks, len(rows) - 1)
        return list(map(Segment, sources[firsts].tolist(), rows[firsts].tolist(), (rows[lasts] + 1).tolist()))
