"""Encodes a message as one frame, and reads any rows of a frame without copying or trusting the rest.

`protocols.data.frame` defines the bytes. `open_frame` verifies only the header; `Frame.read` verifies the blocks of the
selected rows, then the values of those rows. `decode` reads all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.columns import Batch, ColumnSpec, check_form, columns_of, empty
from protocols.data.frame import (
    ALIGNMENT,
    LENGTHS,
    TABLE,
    BadFrame,
    Buffer,
    Bytes,
    FrameLayout,
    Header,
    Indices,
    aligned,
    bytes_of,
    cut_rows,
    encode_header,
    seal,
    table_of,
    unseal,
)
from protocols.data.jagged import Array, Jagged
from protocols.data.messages import SCHEMAS
from protocols.data.partition import Rows, cut
from protocols.data.schema import check_columns, default_column
from protocols.data.selection import Selection

MAX_FRAME_BYTES, MAX_ROWS = 1 << 30, 1 << 20  # the largest frame that a reader accepts
_MOST = (1 << 63) - 1  # a term or attempt with the longest encoding


def encode(message: Batch, term: int = 0, attempt: int = 0, *, block_bytes: int | None = None) -> Bytes:
    """The frame of a message, uint8 [bytes], in one allocation that starts on a multiple of 64.

    A block of rows has at most `block_bytes`, unless one row is larger; `frame.cut_rows` chooses for None. Raises
    ValueError if a column does not have its declared form or the message is too large. Values (finite, unique ids) are
    checked by the reader; `message.check()` does the same beforehand.
    """
    if term < 0 or attempt < 0 or (block_bytes is not None and block_bytes < 1):
        raise ValueError(
            f"term {term}, attempt {attempt}, block_bytes {block_bytes}: none is negative, a block not empty"
        )
    specs = columns_of(type(message))
    for spec in specs:
        check_form(message, spec)
    if len(message) > MAX_ROWS or message.nbytes > MAX_FRAME_BYTES:
        raise ValueError(
            f"{type(message).__name__} of {len(message)} rows and {message.nbytes} bytes: readers accept"
            f" {MAX_ROWS} rows and {MAX_FRAME_BYTES} bytes; cut it"
        )
    table = _table(message, specs, block_bytes)
    header = Header(message.schema_id, message.schema_version, term, attempt, len(message), specs, table.tobytes())
    _, start = encode_header(header)
    layout = FrameLayout(specs, table[:, :-1], start)
    frame = aligned(layout.end)
    written = start
    for span, array in zip(layout.spans, _arrays(message, specs), strict=True):
        frame[written : span.start] = 0
        span.view(frame)[:] = array
        written = span.stop
    table[:, -1] = layout.blocks().checksums(frame, np.arange(len(table)))
    seal(frame, encode_header(msgspec.structs.replace(header, blocks=table.tobytes()))[0])
    return frame


def cut_within(message: Batch, frame_bytes: int) -> list[Rows]:
    """Partition the rows into the fewest contiguous parts whose frames have at most `frame_bytes`, evenly filled.

    Empty if one row alone needs more, or if there is no row.
    """
    specs = columns_of(type(message))
    jagged = sum(spec.jagged for spec in specs)
    table = bytes(TABLE.itemsize * (2 + jagged))
    header = Header(message.schema_id, message.schema_version, _MOST, _MOST, len(message), specs, table)
    room = frame_bytes - encode_header(header)[1] - ALIGNMENT * (len(specs) + jagged)  # less the padding between arrays
    ends = _ends(message, specs)
    sizes = np.diff(ends)
    if not len(sizes) or sizes.max() > room:
        return []
    return cut(np.arange(len(message)), len(cut_rows(ends, room)) - 1, lengths=sizes)


def decode(buffer: Buffer, *, schemas: Mapping[int, type[Batch]] = SCHEMAS) -> Batch:
    """The message in a frame, as read-only columns that share the buffer's memory, which must not change afterwards.

    Older and newer schema versions are read as `protocols.data.schema` says. Raises BadFrame, and nothing else, for any
    bytes that are not a complete, intact and valid message of `schemas`, of at most MAX_ROWS and MAX_FRAME_BYTES.
    """
    return open_frame(buffer, schemas=schemas).read()


def open_frame(buffer: Buffer, *, schemas: Mapping[int, type[Batch]] = SCHEMAS) -> Frame:
    """Verify a frame's header; its rows can then be read. Raises BadFrame, and nothing else, for any bytes."""
    data = bytes_of(buffer)
    if len(data) > MAX_FRAME_BYTES:
        raise BadFrame(f"frame of {len(data)} bytes, at most {MAX_FRAME_BYTES} are accepted")
    header, start = unseal(data)
    if header.rows > MAX_ROWS:
        raise BadFrame(f"frame of {header.rows} rows, at most {MAX_ROWS} are accepted")
    kind = schemas.get(header.schema)
    if kind is None:
        known = ", ".join(f"{number} {schema.__name__}" for number, schema in sorted(schemas.items()))
        raise BadFrame(f"unknown schema {header.schema}, version {header.version}; this reader knows {known}")
    try:
        check_columns(kind, header.version, header.columns)
    except ValueError as error:
        raise BadFrame(str(error)) from error
    table = table_of(header)
    layout = FrameLayout(header.columns, table[:, :-1], start)
    if len(data) != layout.end:
        raise BadFrame(f"frame is {len(data)} bytes long, its header says {layout.end}")
    return Frame(header, kind, data, layout, table)


class Frame:
    """One frame, from which any rows can be read.

    A block is verified when the first of its rows is read. A damaged block raises on every read and leaves the other
    blocks readable.
    """

    __slots__ = ("_arrays_start", "_blocks", "_checksums", "_data", "_kind", "_spans", "_verified", "header")

    def __init__(self, header: Header, kind: type[Batch], data: Bytes, layout: FrameLayout, table: Array) -> None:
        """Use `open_frame`, which checks that the arguments fit each other."""
        self.header = header
        self._kind = kind
        self._data = data
        self._spans = layout.by_column(header.columns)
        self._arrays_start = layout.start
        self._blocks = layout.blocks()
        self._checksums = table[:, -1]
        self._verified = np.zeros(len(table), bool)

    def __len__(self) -> int:
        return self.header.rows

    @property
    def bytes_read(self) -> int:
        """Bytes of the frame that were read so far: everything before the arrays, and the verified blocks."""
        return self._arrays_start + self._blocks.nbytes(self._verified)

    def read(self, rows: npt.ArrayLike | None = None) -> Batch:
        """The given rows in the given order, by default all; only their blocks are read.

        A rising run of adjacent rows shares the buffer's memory, other rows are copied; columns are always read-only.
        Raises BadFrame if these rows are damaged or invalid, IndexError for a row that the frame does not have,
        ValueError for indices that are no integers or occur twice.
        """
        selection = Selection.of(self._blocks.bounds[0], rows)
        if selection.nothing:
            return empty(self._kind)
        self._verify(selection.blocks)
        specs = columns_of(self._kind)
        try:
            columns: dict[str, Any] = {
                spec.name: self._column(spec.name, selection) for spec in specs if spec.name in self._spans
            }
            missing = [spec for spec in specs if spec.name not in columns]
            columns |= {spec.name: default_column(self._kind, spec, columns) for spec in missing}
            message = self._kind(**columns)
            message.check()
        except ValueError as error:
            raise BadFrame(f"{self._kind.__name__}: {error}") from error
        return message

    def _verify(self, blocks: slice | Indices) -> None:
        unread = np.arange(len(self._verified))[blocks]
        unread = unread[~self._verified[unread]]
        intact = self._checksums[unread] == self._blocks.checksums(self._data, unread)
        self._verified[unread[intact]] = True
        if not intact.all():
            block = int(unread[~intact][0])
            first, stop = self._blocks.bounds[0, block : block + 2]
            raise BadFrame(f"rows {first} to {stop - 1} are damaged: the checksum of block {block} differs")

    def _column(self, name: str, selection: Selection) -> Array | Jagged:
        *lengths, values = self._spans[name]
        if not lengths:
            return selection.plain(values.view(self._data))
        try:
            return selection.jagged(
                values.view(self._data), lengths[0].view(self._data), self._blocks.bounds[values.unit]
            )
        except ValueError as error:
            raise BadFrame(f"{self._kind.__name__}: {name}: {error}") from error


# --- writing


def _table(message: Batch, specs: tuple[ColumnSpec, ...], block_bytes: int | None) -> Array:
    """The header's table of blocks, with checksums still 0."""
    jagged = [getattr(message, spec.name) for spec in specs if spec.jagged]
    cuts = cut_rows(_ends(message, specs), block_bytes)
    table = np.zeros((len(cuts) - 1, 2 + len(jagged)), TABLE)
    for unit, bounds in enumerate([cuts, *(column.offsets[cuts] for column in jagged)]):
        table[:, unit] = bounds[1:] - bounds[:-1]
    return table


def _ends(message: Batch, specs: tuple[ColumnSpec, ...]) -> Indices:
    """Cumulative bytes of the rows: before each row, and of all, int64 [N + 1]."""
    jagged = [getattr(message, spec.name) for spec in specs if spec.jagged]
    of_each_row = sum(np.dtype(spec.dtype).itemsize for spec in specs if not spec.jagged)
    ends = np.arange(len(message) + 1) * (of_each_row + LENGTHS.itemsize * len(jagged))
    for column in jagged:
        ends += column.offsets * column.dtype.itemsize
    return ends


def _arrays(message: Batch, specs: tuple[ColumnSpec, ...]) -> Iterator[Array]:
    for spec in specs:
        column = getattr(message, spec.name)
        if spec.jagged:
            yield column.lengths
            yield column.values
        else:
            yield column
