"""A message's bytes: one frame, written once, read without a copy, and never believed before it is checked.

    magic b"AFLO" | u32 format | u64 header length | u32 CRC of header | header (msgpack) | tail | u32 CRC of tail

All integers are little endian. The header's CRC covers the fields before it as well. The tail holds the
columns in the header's order, each array on a multiple of 64 bytes from the frame's start: a plain column
is its N values, a jagged one its N + 1 int64 offsets, then its values. The tail's CRC starts where the
header ends, so it covers the padding, too, and the frame ends with it: no byte is outside a checksum.
Places follow from the header's counts alone, so no frame can name overlapping or foreign bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.columns import Array, Batch, ColumnSpec, Jagged, columns_of
from protocols.messages import SCHEMAS

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Count = Annotated[int, msgspec.Meta(ge=0)]

_MAGIC = b"AFLO"
_FORMAT = 1
_PROLOGUE = struct.Struct("<4sIQ")
_CRC = struct.Struct("<I")
_HEADER_START = _PROLOGUE.size + _CRC.size
_ALIGNMENT = 64  # a cache line; what Ray's object store aligns a buffer to
_MAX_HEADER_BYTES = 1 << 16  # hundreds of columns

_OFFSETS = np.dtype("<i8")
_NUMBERS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _NUMBERS.split()}


class BadFrame(Exception):
    """Bytes that are no acceptable message; `reason` says why, for the quarantine."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Limits(msgspec.Struct, frozen=True):
    """What a reader accepts at most."""

    max_frame_bytes: int = 1 << 30
    max_rows: int = 1 << 20


class Column(msgspec.Struct, frozen=True):
    """One column of a frame: `size` counts its values, N for a plain column."""

    name: str
    dtype: str  # numpy's name
    jagged: bool
    size: Count


class Header(msgspec.Struct, frozen=True):
    """What a frame says about itself."""

    schema: Count  # the message's schema_id
    version: Count  # its schema_version, where it was written
    term: Count  # lineage of the weights that the rows come from
    attempt: Count  # 0 for the first delivery
    rows: Count
    columns: tuple[Column, ...]


_DEFAULT_LIMITS = Limits()
_header_decoder = msgspec.msgpack.Decoder(Header)


def encode(message: Batch, term: int = 0, attempt: int = 0) -> npt.NDArray[np.uint8]:
    """The frame of a message, uint8 [bytes], in one allocation that starts on a multiple of 64.

    Raises ValueError where a column does not have its declared form. Meaning (finite values, ids that occur
    once) is for the reader to judge: `message.check()` says beforehand what it will find.
    """
    if term < 0 or attempt < 0:
        raise ValueError(f"term {term}, attempt {attempt}: neither is negative")
    specs = columns_of(type(message))
    columns = tuple(_describe(message, spec) for spec in specs)
    header = Header(message.schema_id, message.schema_version, term, attempt, len(message), columns)
    packed = msgspec.msgpack.encode(header)
    head = _PROLOGUE.pack(_MAGIC, _FORMAT, len(packed))
    head += _CRC.pack(zlib.crc32(packed, zlib.crc32(head))) + packed

    places = [place for column in _layout(header, len(head)) for place in column]
    end = places[-1].stop
    frame = _aligned(end + _CRC.size)
    frame[: len(head)] = np.frombuffer(head, np.uint8)
    written = len(head)
    for place, array in zip(places, _arrays(message, specs), strict=True):
        frame[written : place.start] = 0
        place.view(frame)[:] = array
        written = place.stop
    _CRC.pack_into(frame.data, end, zlib.crc32(frame.data[len(head) : end]))
    return frame


def decode(buffer: Buffer, *, limits: Limits = _DEFAULT_LIMITS, schemas: Mapping[int, type[Batch]] = SCHEMAS) -> Batch:
    """The message in a frame: read-only columns that share the buffer's memory, which must not change after.

    A frame of an older schema version gets the defaults of the columns that it lacks; of a newer one the
    unknown columns are ignored. Raises BadFrame, and nothing else, for any bytes that are not a whole,
    intact and meaningful message of `schemas` within `limits`.
    """
    data = _bytes_of(buffer)
    if len(data) > limits.max_frame_bytes:
        raise BadFrame(f"frame of {len(data)} bytes, at most {limits.max_frame_bytes} are accepted")
    header, tail = _read_header(data)
    if header.rows > limits.max_rows:
        raise BadFrame(f"frame of {header.rows} rows, at most {limits.max_rows} are accepted")
    layout = _layout(header, tail)
    end = layout[-1][-1].stop if layout else tail
    if len(data) != end + _CRC.size:
        raise BadFrame(f"frame is {len(data)} bytes long, its header says {end + _CRC.size}")
    if zlib.crc32(data.data[tail:end]) != _CRC.unpack_from(data.data, end)[0]:
        raise BadFrame(f"columns of the frame are damaged: checksum of bytes {tail} to {end} differs")
    kind = schemas.get(header.schema)
    if kind is None:
        known = ", ".join(f"{number} {schema.__name__}" for number, schema in sorted(schemas.items()))
        raise BadFrame(f"unknown schema {header.schema}, version {header.version}; this reader knows {known}")
    places = dict(zip((column.name for column in header.columns), layout, strict=True))
    return _build(kind, header, places, data)


def read_header(buffer: Buffer) -> Header:
    """A frame's header; the buffer may end right after it. Raises BadFrame where the header is not intact.

    Says nothing about the columns' bytes: only `decode` has verified them.
    """
    return _read_header(_bytes_of(buffer))[0]


# --- where things lie


class _Place(msgspec.Struct, frozen=True):
    """`count` values from byte `start` of the frame."""

    start: int
    count: int
    dtype: np.dtype[Any]

    @property
    def stop(self) -> int:
        return self.start + self.count * self.dtype.itemsize

    def view(self, frame: npt.NDArray[np.uint8]) -> Array:
        return frame[self.start : self.stop].view(self.dtype)


def _layout(header: Header, start: int) -> list[tuple[_Place, ...]]:
    """The arrays of each column, in order, from the first boundary after `start`."""
    layout = []
    for column in header.columns:
        values = (column.size, _DTYPES[column.dtype])
        places = []
        for count, dtype in ((header.rows + 1, _OFFSETS), values) if column.jagged else (values,):
            place = _Place(-(-start // _ALIGNMENT) * _ALIGNMENT, count, dtype)
            places.append(place)
            start = place.stop
        layout.append(tuple(places))
    return layout


def _aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory that starts on a boundary, which numpy alone does not promise."""
    block = np.empty(nbytes + _ALIGNMENT, np.uint8)
    first = -block.ctypes.data % _ALIGNMENT
    return block[first : first + nbytes]


def _bytes_of(buffer: Buffer) -> npt.NDArray[np.uint8]:
    """The buffer as read-only bytes, so that every view of it is read-only, too."""
    try:
        data = (buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)).view()
    except (ValueError, BufferError) as error:
        raise BadFrame(f"a frame lies in one contiguous buffer: {error}") from error
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise BadFrame(f"a frame is a contiguous uint8 array, got {data.dtype} {list(data.shape)}")
    data.flags.writeable = False
    return data


# --- reading


def _read_header(data: npt.NDArray[np.uint8]) -> tuple[Header, int]:
    """The checked header, and where the tail begins."""
    if len(data) < _HEADER_START:
        raise BadFrame(f"frame of {len(data)} bytes is shorter than the {_HEADER_START} before a header")
    magic, version, length = _PROLOGUE.unpack_from(data.data)
    if magic != _MAGIC:
        raise BadFrame(f"no frame: it starts with {magic!r}, want {_MAGIC!r}")
    if version != _FORMAT:
        raise BadFrame(f"frame format {version}, this reader knows format {_FORMAT}")
    end = _HEADER_START + length
    if length > _MAX_HEADER_BYTES or end > len(data):
        raise BadFrame(f"header of {length} bytes in {len(data)}, at most {_MAX_HEADER_BYTES} are accepted")
    packed = data.data[_HEADER_START:end]
    if zlib.crc32(packed, zlib.crc32(data.data[: _PROLOGUE.size])) != _CRC.unpack_from(data.data, _PROLOGUE.size)[0]:
        raise BadFrame("header of the frame is damaged: its checksum differs")
    try:
        header = _header_decoder.decode(packed)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadFrame(f"header of the frame: {error}") from error
    _check_columns(header)
    return header, end


def _check_columns(header: Header) -> None:
    seen: set[str] = set()
    for column in header.columns:
        if column.name in seen:
            raise BadFrame(f"column {column.name:.40} occurs twice")
        if column.dtype not in _DTYPES:
            raise BadFrame(f"column {column.name:.40}: unknown type {column.dtype:.40}")
        if not column.jagged and column.size != header.rows:
            raise BadFrame(f"column {column.name:.40}: {column.size} values in {header.rows} rows")
        seen.add(column.name)


def _build(
    kind: type[Batch], header: Header, places: Mapping[str, tuple[_Place, ...]], data: npt.NDArray[np.uint8]
) -> Batch:
    """The message of a frame whose bytes are intact: its columns, the defaults of those it lacks, its meaning."""
    specs = columns_of(kind)
    _check_schema(kind, header, specs)
    try:
        columns: dict[str, Any] = {
            spec.name: _column([place.view(data) for place in places[spec.name]])
            for spec in specs
            if spec.name in places
        }
        columns |= {spec.name: _default(kind, spec, columns) for spec in specs if spec.name not in columns}
        message = kind(**columns)
        message.check()
    except ValueError as error:
        raise BadFrame(f"{kind.__name__}: {error}") from error
    return message


def _check_schema(kind: type[Batch], header: Header, specs: tuple[ColumnSpec, ...]) -> None:
    sent = {column.name: ColumnSpec(column.name, column.dtype, column.jagged) for column in header.columns}
    what = f"{kind.__name__} version {header.version}"
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


def _column(arrays: list[Array]) -> Array | Jagged:
    if len(arrays) == 1:
        return arrays[0]
    offsets, values = arrays
    return Jagged(values, offsets)


def _default(kind: type[Batch], spec: ColumnSpec, present: Mapping[str, Array | Jagged]) -> Array | Jagged:
    """The column that an older frame lacks, as `Batch` documents it."""
    value, rows = kind.defaults[spec.name], len(present["sample_ids"])
    if not spec.jagged:
        return np.full(rows, value, spec.dtype)
    for group in kind.aligned:
        for name in group if spec.name in group else ():
            if isinstance(peer := present.get(name), Jagged):
                return peer.with_values(np.full(len(peer.values), value, spec.dtype))
    return Jagged.from_rows([value] * rows, dtype=spec.dtype)


# --- writing


def _describe(message: Batch, spec: ColumnSpec) -> Column:
    column = getattr(message, spec.name)
    actual = ColumnSpec(spec.name, column.dtype.name, isinstance(column, Jagged))
    if actual != spec:
        raise ValueError(f"{type(message).__name__}.{spec.name} is {_form(actual)}, want {_form(spec)}")
    if not spec.jagged and column.ndim != 1:
        raise ValueError(f"{type(message).__name__}.{spec.name}: shape {list(column.shape)}, want one value a row")
    if len(column) != len(message):
        raise ValueError(f"{type(message).__name__}.{spec.name}: {len(column)} rows, sample_ids has {len(message)}")
    return Column(spec.name, spec.dtype, spec.jagged, len(column.values) if spec.jagged else len(column))


def _arrays(message: Batch, specs: tuple[ColumnSpec, ...]) -> Iterator[Array]:
    for spec in specs:
        column = getattr(message, spec.name)
        yield from (column.offsets, column.values) if isinstance(column, Jagged) else (column,)
