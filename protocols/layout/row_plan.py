"""Row plans: what each rank reads of a message that lies in shards, whatever the two topologies are.

A producing service puts one shard a collecting rank; `Located` says in which shard each row lies. A consuming
service cuts the same rows by its own transfer protocol. Where the two meet, `Located.segments` gives a destination
rank the segments of its rows and nothing else. Neither side knows the other's topology, and only row numbers are
touched.
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
    """Where each of N rows lies: `sources` int64 [N], index of a shard, and `rows` int64 [N], its row in that shard.

    Raises ValueError for arrays that are not such a pair, or hold a number below 0.
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
        """What has to be read, in order, for the rows at `index` [any number]; their concatenation is those rows.

        Rows that follow each other in one shard merge, so no two neighbouring segments could be one.
        Raises ValueError for an index that is not flat integers, IndexError for a row that is not here.
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
