"""The frame format: contiguous columns, divided into blocks of rows that are verified one by one.

    magic b"AFLO" | u32 format | u64 header length | u32 CRC of header | header (msgpack) | arrays

All integers are little endian. Arrays follow in the order of the header's columns, each on a multiple of 64 bytes from
the frame's start: a plain column is its N values; a jagged one is its N row lengths, uint32, then its values. A column
is contiguous, so any run of adjacent rows is a view of it.

Blocks are runs of adjacent rows. The header's table holds, per block, its number of rows, its number of values in each
jagged column, and the CRC32 of its bytes: its piece of every array, chained in the order of the arrays. A piece
reaches to the start of the next one, and the header to the first array, so padding is included: every byte is covered
by exactly one checksum. Positions follow from the counts alone, so no frame can refer to overlapping or foreign bytes.

Why not pyarrow's IPC format, which is columnar and zero-copy too: it has no checksums, and its reader trusts the
buffers, while these frames cross machines and come from workers outside the run. Its record batches divide a column,
so rows that cross a batch would be copied. And this package would need pyarrow, which only the file readers use.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.columns import ColumnSpec
from protocols.data.jagged import Array

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
Buffer = bytes | bytearray | memoryview | Bytes
Count = Annotated[int, msgspec.Meta(ge=0)]

LENGTHS = np.dtype("<u4")  # row lengths of a jagged column
TABLE = np.dtype("<u4")  # entries of the header's table
ALIGNMENT = 64  # a cache line; Ray's object store aligns buffers to it too
_NUMBERS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _NUMBERS.split()}

_MAGIC = b"AFLO"
_FORMAT = 2
_PROLOGUE = struct.Struct("<4sIQ")
_CRC = struct.Struct("<I")
_HEADER_START = _PROLOGUE.size + _CRC.size
_MAX_COLUMNS = 256  # decoded columns take more memory than their bytes, so their number is bounded
_BLOCKS_AT_ONCE = 256  # positions are computed for this many blocks at a time, to bound memory
_BLOCK_BYTES = (1 << 16, 1 << 20)  # smaller blocks cost more in calls than in bytes; larger ones read too much per row


class BadFrame(Exception):
    """The bytes are not an acceptable message; `reason` says why, for the quarantine."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(msgspec.Struct, frozen=True):
    """The header of a frame."""

    schema: Count  # the message's schema_id
    version: Count  # the writer's schema_version
    term: Count  # lineage of the weights that the rows come from
    attempt: Count  # 0 for the first delivery
    rows: Count
    columns: Annotated[tuple[ColumnSpec, ...], msgspec.Meta(max_length=_MAX_COLUMNS)]
    blocks: bytes  # the table, see `table_of`


_header_decoder = msgspec.msgpack.Decoder(Header)


# --- positions


class ArraySpan(msgspec.Struct, frozen=True):
    """An array of `count` values from byte `start` of the frame."""

    start: int
    count: int
    dtype: np.dtype[Any]
    unit: int  # the unit of `count`, by which blocks divide it: 0 rows, 1 + j the values of jagged column j

    @property
    def stop(self) -> int:
        return self.start + self.count * self.dtype.itemsize

    def view(self, frame: Bytes) -> Array:
        return frame[self.start : self.stop].view(self.dtype)


class FrameLayout:
    """The positions of a frame's arrays: `spans` in order, up to byte `end`. Exact integers, so no count overflows."""

    __slots__ = ("_counts", "end", "spans", "start")

    def __init__(self, columns: tuple[ColumnSpec, ...], counts: Array, start: int) -> None:
        """From the blocks' counts [B, 1 + J], rows and values of jagged columns, and the first array's byte."""
        self._counts = counts
        totals = counts.sum(axis=0, dtype=np.uint64).tolist()
        self.spans: list[ArraySpan] = []
        self.start = self.end = start
        units = itertools.count(1)
        for column in columns:
            unit = next(units) if column.jagged else 0
            if column.jagged:
                self._add(totals[0], LENGTHS, 0)
            self._add(totals[unit], _DTYPES[column.dtype], unit)

    def _add(self, count: int, dtype: np.dtype[Any], unit: int) -> None:
        span = ArraySpan(_boundary(self.end), count, dtype, unit)
        self.spans.append(span)
        self.end = span.stop

    def by_column(self, columns: tuple[ColumnSpec, ...]) -> dict[str, list[ArraySpan]]:
        """The arrays of each column: its values, preceded by its row lengths if it is jagged."""
        following = iter(self.spans)
        return {column.name: [next(following) for _ in range(1 + column.jagged)] for column in columns}

    def blocks(self) -> BlockBounds:
        """How blocks divide the arrays. Call it only if `end` is the frame's end; then nothing overflows."""
        bounds = np.zeros((self._counts.shape[1], len(self._counts) + 1), np.int64)
        np.cumsum(self._counts.T, axis=1, dtype=np.int64, out=bounds[:, 1:])
        return BlockBounds(
            bounds,
            units=np.array([span.unit for span in self.spans]),
            sizes=np.array([span.dtype.itemsize for span in self.spans]),
            starts=np.array([*(span.start for span in self.spans), self.end]),
        )


class BlockBounds(msgspec.Struct, frozen=True):
    """Where the blocks begin and the last one ends, in rows and in values, for the A arrays of a frame."""

    bounds: Indices  # [1 + J, B + 1] row, and value of each jagged column
    units: Indices  # [A] which row of `bounds` divides an array
    sizes: Indices  # [A] bytes of one value
    starts: Indices  # [A + 1] first byte of each array, and the frame's end

    def checksums(self, frame: Bytes, blocks: Indices) -> list[int]:
        """The CRC32 of each of the given blocks, computed from the frame's bytes."""
        data, crc32 = frame.data, zlib.crc32  # local names: a frame has thousands of pieces
        if self.bounds.shape[1] == 2:  # a single block is all arrays in one piece
            return [crc32(data[int(self.starts[0]) : int(self.starts[-1])]) for _ in blocks]
        checksums = []
        for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
            starts, stops = self._pieces(blocks[first : first + _BLOCKS_AT_ONCE])
            for pieces in map(zip, starts.tolist(), stops.tolist()):
                checksum = 0
                for start, stop in pieces:
                    checksum = crc32(data[start:stop], checksum)
                checksums.append(checksum)
        return checksums

    def _pieces(self, blocks: Indices) -> tuple[Indices, Indices]:
        """Start and stop of the blocks' pieces, [K, A] each, in bytes of the frame."""
        starts = self.bounds[self.units, blocks[:, None]] * self.sizes + self.starts[:-1]
        stops = self.bounds[self.units, blocks[:, None] + 1] * self.sizes + self.starts[:-1]
        stops[blocks == self.bounds.shape[1] - 2] = self.starts[1:]  # the last block includes the padding
        return starts, stops

    def nbytes(self, blocks: npt.NDArray[np.bool_]) -> int:
        """Bytes of the marked blocks, padding included."""
        per_unit = np.bincount(self.units, self.sizes, len(self.bounds)).astype(np.int64)
        within = per_unit @ np.diff(self.bounds)
        padding = self.starts[-1] - self.starts[0] - within.sum() if blocks[-1:].any() else 0
        return int(within[blocks].sum() + padding)


def cut_rows(ends: Indices, block_bytes: int | None) -> Indices:
    """The first row of each block, and N, int64 [B + 1]: blocks of at most `block_bytes` and at least one row.

    `ends` [N + 1] are the cumulative bytes of the rows. By default a block is 1/256 of the frame, within 64 KiB and
    1 MiB: then a reader of few rows reads little else, and blocks cost a reader of all rows next to nothing.
    """
    rows = len(ends) - 1
    low, high = _BLOCK_BYTES
    target = min(max(int(ends[-1]) // 256, low), high) if block_bytes is None else block_bytes
    if ends[-1] <= target:
        return np.array([0, rows] if rows else [0])
    cuts = [0]
    while (row := cuts[-1]) < rows:
        cuts.append(max(row + 1, int(ends.searchsorted(ends[row] + target, side="right")) - 1))
    return np.array(cuts)


def aligned(nbytes: int) -> Bytes:
    """Uninitialised memory that starts on a multiple of ALIGNMENT, which numpy does not guarantee."""
    block = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = -block.ctypes.data % ALIGNMENT
    return block[first : first + nbytes]


def bytes_of(buffer: Buffer) -> Bytes:
    """The buffer as read-only bytes, so that every view of it is read-only too. Raises BadFrame."""
    try:
        data = (buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)).view()
    except (ValueError, BufferError) as error:
        raise BadFrame(f"a frame lies in one contiguous buffer: {error}") from error
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise BadFrame(f"a frame is a contiguous uint8 array, got {data.dtype} {list(data.shape)}")
    data.flags.writeable = False
    return data


def _boundary(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


# --- the header


def encode_header(header: Header) -> tuple[bytes, int]:
    """The header's bytes, and the start of the first array. The length does not depend on the checksums."""
    packed = msgspec.msgpack.encode(header)
    return packed, _boundary(_HEADER_START + len(packed))


def seal(frame: Bytes, packed: bytes) -> None:
    """Write everything before the arrays: the prologue, the header and its checksum."""
    head = _PROLOGUE.pack(_MAGIC, _FORMAT, len(packed))
    padded = packed.ljust(_boundary(_HEADER_START + len(packed)) - _HEADER_START, b"\0")
    head += _CRC.pack(zlib.crc32(padded, zlib.crc32(head))) + padded
    frame[: len(head)] = np.frombuffer(head, np.uint8)


def unseal(data: Bytes) -> tuple[Header, int]:
    """The verified header, and the start of the first array; the frame may end after the header. Raises BadFrame."""
    if len(data) < _HEADER_START:
        raise BadFrame(f"frame of {len(data)} bytes is shorter than the {_HEADER_START} before a header")
    view = data.data
    magic, version, length = _PROLOGUE.unpack_from(view)
    if magic != _MAGIC:
        raise BadFrame(f"no frame: it starts with {magic!r}, want {_MAGIC!r}")
    if version != _FORMAT:
        raise BadFrame(f"frame format {version}, this reader knows format {_FORMAT}")
    end = _boundary(_HEADER_START + length)
    if end > len(data):
        raise BadFrame(f"header of {length} bytes, padded to byte {end}, in a frame of {len(data)}")
    if (
        zlib.crc32(view[_HEADER_START:end], zlib.crc32(view[: _PROLOGUE.size]))
        != _CRC.unpack_from(view, _PROLOGUE.size)[0]
    ):
        raise BadFrame("header of the frame is damaged: its checksum differs")
    try:
        header = _header_decoder.decode(view[_HEADER_START : _HEADER_START + length])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadFrame(f"header of the frame: {error}") from error
    _check_columns(header)
    return header, end


def table_of(header: Header) -> Array:
    """The header's table of blocks, uint32 [B, 2 + J]: rows, values of each jagged column, CRC32. Raises BadFrame."""
    width = 2 + sum(column.jagged for column in header.columns)
    if len(header.blocks) % (width * TABLE.itemsize):
        raise BadFrame(f"table of {len(header.blocks)} bytes is not made of blocks of {width} numbers")
    table = np.frombuffer(header.blocks, TABLE).reshape(-1, width)
    rows = int(table[:, 0].sum(dtype=np.uint64))
    if rows != header.rows or not table[:, 0].all():
        raise BadFrame(f"blocks have {rows} rows, the frame {header.rows}; none may be empty")
    return table


def _check_columns(header: Header) -> None:
    seen: set[str] = set()
    for column in header.columns:
        if column.name in seen:
            raise BadFrame(f"column {column.name:.40} occurs twice")
        if column.dtype not in _DTYPES:
            raise BadFrame(f"column {column.name:.40}: unknown type {column.dtype:.40}")
        seen.add(column.name)
