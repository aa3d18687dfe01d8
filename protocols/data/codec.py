"""A message and its frame: written once, read row by row without a copy, and never believed before it is checked.

`protocols.data.frame` lays out the bytes. `open_frame` verifies a header and nothing more; `Frame.read` verifies
the blocks of the rows it is asked for, then what those rows mean. `decode` reads all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.columns import Array, Batch, ColumnSpec, Jagged, columns_of, empty
from protocols.data.frame import (
    ALIGNMENT,
    LENGTHS,
    TABLE,
    BadFrame,
    Buffer,
    Bytes,
    Column,
    Header,
    Indices,
    Layout,
    aligned,
    bytes_of,
    cut_rows,
    pack,
    seal,
    table_of,
    unseal,
)
from protocols.data.messages import SCHEMAS
from protocols.data.partition import Rows, cut
from protocols.data.selection import Selection

__all__ = [
    "BadFrame",
    "Column",
    "Frame",
    "Header",
    "Limits",
    "cut_within",
    "decode",
    "encode",
    "open_frame",
    "read_header",
]


class Limits(msgspec.Struct, frozen=True):
    """What a reader accepts at most."""

    max_frame_bytes: int = 1 << 30
    max_rows: int = 1 << 20


_DEFAULT_LIMITS = Limits()
_MOST = (1 << 63) - 1  # of a term or an attempt: the longest that its header can be


def encode(message: Batch, term: int = 0, attempt: int = 0, *, block_bytes: int | None = None) -> Bytes:
    """The frame of a message, uint8 [bytes], in one allocation that starts on a multiple of 64.

    `block_bytes` is what a block of rows holds at most, unless one row is larger; see `frame.cut_rows` for
    what None chooses. Raises ValueError where a column does not have its declared form. Meaning (finite
    values, ids that occur once) is for the reader to judge: `message.check()` says beforehand what it will find.
    """
    if term < 0 or attempt < 0 or (block_bytes is not None and block_bytes < 1):
        raise ValueError(
            f"term {term}, attempt {attempt}, block_bytes {block_bytes}: none is negative, a block not empty"
        )
    if len(message) > _DEFAULT_LIMITS.max_rows or message.nbytes > _DEFAULT_LIMITS.max_frame_bytes:
        raise ValueError(
            f"{type(message).__name__} of {len(message)} rows and {message.nbytes} bytes: readers accept"
            f" {_DEFAULT_LIMITS.max_rows} rows and {_DEFAULT_LIMITS.max_frame_bytes} bytes; cut it"
        )
    specs = columns_of(type(message))
    columns = tuple(_describe(message, spec) for spec in specs)
    table = _table(message, specs, block_bytes)
    header = Header(message.schema_id, message.schema_version, term, attempt, len(message), columns, table.tobytes())
    _, start = pack(header)
    layout = Layout(columns, table[:, :-1], start)
    frame = aligned(layout.end)
    written = start
    for place, array in zip(layout.places, _arrays(message, specs), strict=True):
        frame[written : place.start] = 0
        place.view(frame)[:] = array
        written = place.stop
    table[:, -1] = layout.cut().checksums(frame, np.arange(len(table)))
    seal(frame, pack(msgspec.structs.replace(header, blocks=table.tobytes()))[0])
    return frame


def cut_within(message: Batch, frame_bytes: int) -> list[Rows]:
    """The rows cut into as few pieces as have frames of at most `frame_bytes` each, none heavier than need be.

    Contiguous, and in their order. Empty where a row alone needs more, or there is no row.
    """
    specs = columns_of(type(message))
    columns = tuple(Column(spec.name, spec.dtype, spec.jagged) for spec in specs)
    jagged = sum(spec.jagged for spec in specs)
    table = bytes(TABLE.itemsize * (2 + jagged))
    header = Header(message.schema_id, message.schema_version, _MOST, _MOST, len(message), columns, table)
    room = frame_bytes - pack(header)[1] - ALIGNMENT * (len(specs) + jagged)  # of padding between arrays
    ends = _ends(message, specs)
    sizes = np.diff(ends)
    if not len(sizes) or sizes.max() > room:
        return []
    return cut(np.arange(len(message)), len(cut_rows(ends, room)) - 1, lengths=sizes)


def decode(buffer: Buffer, *, limits: Limits = _DEFAULT_LIMITS, schemas: Mapping[int, type[Batch]] = SCHEMAS) -> Batch:
    """The message in a frame: read-only columns whose values share the buffer's memory, which must not change after.

    A frame of an older schema version gets the defaults of the columns that it lacks; of a newer one the
    unknown columns are ignored. Raises BadFrame, and nothing else, for any bytes that are not a whole,
    intact and meaningful message of `schemas` within `limits`.
    """
    return open_frame(buffer, limits=limits, schemas=schemas).read()


def read_header(buffer: Buffer) -> Header:
    """A frame's header; the buffer may end right after it and its padding to a multiple of 64 bytes.

    Raises BadFrame where the header is not intact. Says nothing about the rest: only reading verifies it.
    """
    return unseal(bytes_of(buffer))[0]


def open_frame(
    buffer: Buffer, *, limits: Limits = _DEFAULT_LIMITS, schemas: Mapping[int, type[Batch]] = SCHEMAS
) -> Frame:
    """A frame whose header is verified, to read rows from. Raises BadFrame and nothing else, for any bytes."""
    data = bytes_of(buffer)
    if len(data) > limits.max_frame_bytes:
        raise BadFrame(f"frame of {len(data)} bytes, at most {limits.max_frame_bytes} are accepted")
    header, start = unseal(data)
    if header.rows > limits.max_rows:
        raise BadFrame(f"frame of {header.rows} rows, at most {limits.max_rows} are accepted")
    kind = schemas.get(header.schema)
    if kind is None:
        known = ", ".join(f"{number} {schema.__name__}" for number, schema in sorted(schemas.items()))
        raise BadFrame(f"unknown schema {header.schema}, version {header.version}; this reader knows {known}")
    _check_schema(kind, header, columns_of(kind))
    table = table_of(header)
    layout = Layout(header.columns, table[:, :-1], start)
    if len(data) != layout.end:
        raise BadFrame(f"frame is {len(data)} bytes long, its header says {layout.end}")
    return Frame(header, kind, data, layout, table)


class Frame:
    """The rows of one frame, of which only those that are asked for are read.

    A block is verified the first time that one of its rows is read; a damaged one is refused each time and
    leaves the others readable.
    """

    __slots__ = ("_arrays_start", "_checksums", "_cuts", "_data", "_kind", "_places", "_verified", "header")

    def __init__(self, header: Header, kind: type[Batch], data: Bytes, layout: Layout, table: Array) -> None:
        """For `open_frame`, which has made sure that the parts fit each other."""
        self.header = header
        self._kind = kind
        self._data = data
        self._places = layout.by_column(header.columns)
        self._arrays_start = layout.start
        self._cuts = layout.cut()
        self._checksums = table[:, -1]
        self._verified = np.zeros(len(table), bool)

    def __len__(self) -> int:
        return self.header.rows

    @property
    def bytes_read(self) -> int:
        """Bytes of the frame that were read so far: what stands before the arrays, and the verified blocks."""
        return self._arrays_start + self._cuts.nbytes(self._verified)

    def read(self, rows: npt.ArrayLike | None = None) -> Batch:
        """The given rows in the given order, by default all; only their blocks are read.

        A contiguous rising run shares the buffer's memory, anything else is copied; columns are read-only in
        either case. Raises BadFrame where these rows are damaged or mean nothing, IndexError for a row that the
        frame does not have, ValueError for rows that are no integers or occur twice.
        """
        selection = Selection.of(self._cuts.bounds[0], rows)
        if selection.nothing:
            return empty(self._kind)
        self._verify(selection.blocks)
        specs = columns_of(self._kind)
        try:
            columns: dict[str, Any] = {
                spec.name: self._column(spec.name, selection) for spec in specs if spec.name in self._places
            }
            columns |= {spec.name: _default(self._kind, spec, columns) for spec in specs if spec.name not in columns}
            message = self._kind(**columns)
            message.check()
        except ValueError as error:
            raise BadFrame(f"{self._kind.__name__}: {error}") from error
        return message

    def _verify(self, blocks: slice | Indices) -> None:
        unread = np.arange(len(self._verified))[blocks]
        unread = unread[~self._verified[unread]]
        intact = self._checksums[unread] == self._cuts.checksums(self._data, unread)
        self._verified[unread[intact]] = True
        if not intact.all():
            block = int(unread[~intact][0])
            first, stop = self._cuts.bounds[0, block : block + 2]
            raise BadFrame(f"rows {first} to {stop - 1} are damaged: the checksum of block {block} differs")

    def _column(self, name: str, selection: Selection) -> Array | Jagged:
        *lengths, values = self._places[name]
        if not lengths:
            return selection.plain(values.view(self._data))
        try:
            return selection.jagged(
                values.view(self._data), lengths[0].view(self._data), self._cuts.bounds[values.unit]
            )
        except ValueError as error:
            raise BadFrame(f"{self._kind.__name__}: {name}: {error}") from error


# --- schemas grow


def _check_schema(kind: type[Batch], header: Header, specs: tuple[ColumnSpec, ...]) -> None:
    sent = {column.name: ColumnSpec(column.name, column.dtype, column.jagged) for column in header.columns}
    what = f"{kind.__name__} version {header.version}"
    if header.version < kind.oldest_readable:
        raise BadFrame(f"{what} is older than {kind.oldest_readable}, the oldest that this program reads")
    for spec in specs:
        if spec.name not in sent:
            if header.version >= kind.schema_version or spec.name not in kind.defaults:
                raise BadFrame(f"{what} lacks column {spec.name}")
        elif sent[spec.name] != spec:
            raise BadFrame(f"{what}: column {spec.name} is {_form(sent[spec.name])}, want {_form(spec)}")
    unknown = sent.keys() - {spec.name for spec in specs}
    if unknown and header.version <= kind.schema_version:
        raise BadFrame(f"{what} has no column {min(unknown):.40}")


def _form(spec: ColumnSpec) -> str:
    return f"{'jagged ' if spec.jagged else ''}{spec.dtype}"


def _default(kind: type[Batch], spec: ColumnSpec, present: Mapping[str, Array | Jagged]) -> Array | Jagged:
    """The column that an older frame lacks, as `Batch` documents it."""
    value, rows = kind.defaults[spec.name], len(present["sample_ids"])
    if not spec.jagged:
        column = np.full(rows, value, spec.dtype)
        column.flags.writeable = False
        return column
    for group in kind.aligned:
        for name in group if spec.name in group else ():
            if isinstance(peer := present.get(name), Jagged):
                return peer.with_values(np.full(len(peer.values), value, spec.dtype))
    return Jagged.from_rows([value] * rows, dtype=spec.dtype)


# --- what is written


def _describe(message: Batch, spec: ColumnSpec) -> Column:
    column = getattr(message, spec.name)
    where = f"{type(message).__name__}.{spec.name}"
    if isinstance(column, Jagged) != spec.jagged or column.dtype != np.dtype(spec.dtype):
        actual = ColumnSpec(spec.name, column.dtype.name, isinstance(column, Jagged))
        raise ValueError(f"{where} is {_form(actual)}, want {_form(spec)}")
    if not spec.jagged and column.ndim != 1:
        raise ValueError(f"{where}: shape {list(column.shape)}, want one value a row")
    if len(column) != len(message):
        raise ValueError(f"{where}: {len(column)} rows, sample_ids has {len(message)}")
    return Column(spec.name, spec.dtype, spec.jagged)


def _table(message: Batch, specs: tuple[ColumnSpec, ...], block_bytes: int | None) -> Array:
    """How the rows are cut into blocks, as the header says it, with checksums to come."""
    jagged = [getattr(message, spec.name) for spec in specs if spec.jagged]
    cuts = cut_rows(_ends(message, specs), block_bytes)
    table = np.zeros((len(cuts) - 1, 2 + len(jagged)), TABLE)
    for unit, bounds in enumerate([cuts, *(column.offsets[cuts] for column in jagged)]):
        table[:, unit] = bounds[1:] - bounds[:-1]
    return table


def _ends(message: Batch, specs: tuple[ColumnSpec, ...]) -> Indices:
    """Bytes of the rows before each row, and of all, int64 [N + 1]."""
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
