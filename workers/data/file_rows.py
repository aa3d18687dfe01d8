"""Reads the raw rows of one data file: JSON (see workers.data.json_rows), CSV, parquet or Arrow.

A value that nobody reads never refuses a row: NaN and Infinity in JSON, times that Python has no type for. Texts are
UTF-8, with or without a byte-order mark, with either kind of line ends.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from workers.data.json_rows import json_lines, json_value
from workers.data.record import DataError, Record, Unreadable, without_nulls

TABLES = (".parquet", ".arrow")
_CELLS = (".csv", ".tsv")
_TEXTS = (".jsonl", ".ndjson", ".json", *_CELLS)
_COMPRESSED = (".gz", ".zst")
KINDS = (*_TEXTS, *(kind + compressed for kind in _TEXTS for compressed in _COMPRESSED), *TABLES)

_ROWS_AT_ONCE = 1024  # rows read at once from a parquet file, because rows may hold images
_BOM = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # UTF-16 and UTF-32 start with one of these
_DIGESTED = msgspec.json.Encoder(order="sorted", enc_hook=str)


def rows_of(path: Path) -> Iterator[Record]:
    """All rows of a file, or of one array in it (x.json/NAME), in order. Raises DataError at the first bad row."""
    name = ""
    if path.parent.is_file() and _kind(path.parent) == ".json":
        path, name = path.parent, path.name
    if path.suffix in TABLES:
        yield from _table(path)
        return
    try:
        with _open(path) as file:
            _skip_byte_order_mark(path, file)
            match _kind(path):
                case ".csv" | ".tsv":
                    yield from _cells(path, file)
                case ".json":
                    yield from json_value(path, file, name)
                case _:
                    yield from json_lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _kind(path: Path) -> str:
    """The suffix of the text that a file holds, compressed or not."""
    return (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(f"{path}: reading .zst needs pyarrow: pip install 'asyncflow[data]'") from error
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


def json_of(values: dict[str, Any]) -> bytes:
    """A row as JSON with sorted names; NaN is null, a value that JSON has no type for its text."""
    try:
        return _DIGESTED.encode(values)
    except OverflowError:  # an integer of more than 64 bits
        return json.dumps(values, sort_keys=True, ensure_ascii=False, default=str).encode()


def _skip_byte_order_mark(path: Path, file: Any) -> None:
    start: bytes = file.peek(4)[:4]
    if start.startswith(_BOM):
        file.read(len(_BOM))
    elif start.startswith(_OTHER_ENCODINGS) or start[1:2] == b"\x00" or start[:1] == b"\x00":
        raise DataError(f"{path}: is UTF-16 or UTF-32 text: want UTF-8, e.g. `iconv -f UTF-16 -t UTF-8 {path.name}`")


# --- CSV


def _cells(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """The rows below a header. All cells are texts; an empty one counts as absent."""
    csv.field_size_limit(sys.maxsize)  # by default 128 KiB, which a long text exceeds
    text = io.TextIOWrapper(file, "utf-8", newline="")
    line, number = text.readline(), 1
    delimiter = "\t" if ".tsv" in path.suffixes else max(",;\t", key=line.count)
    header = next(csv.reader([line], delimiter=delimiter), [])
    if len(set(header)) < len(header):
        raise DataError(f"{path}:1: two columns have one name: {', '.join(header)}")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            place, number = f"{path}:{number + 1}", reader.line_num + 1
            if len(cells) != len(header) and cells:
                raise DataError(f"{place}: has {len(cells)} cells, the header has {len(header)}")
            if cells:
                yield Record(place, {name: cell for name, cell in zip(header, cells, strict=True) if cell})
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: can't be read: {error}") from error


# --- tables


def _table(path: Path) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading tables needs pyarrow: pip install 'asyncflow[data]'") from error
    number = 0
    try:
        with pa.memory_map(str(path)) as source:
            is_parquet = path.suffix == ".parquet"
            for batch in pq.ParquetFile(source).iter_batches(_ROWS_AT_ONCE) if is_parquet else _arrow(source):
                names, columns = batch.schema.names, [_column(column) for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    number += 1
                    values = dict(zip(names, cells, strict=True))
                    yield Record(f"{path}: row {number}", without_nulls(values))
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: can't be read from row {number + 1} on: {reason}") from error


def _arrow(source: Any) -> Iterator[Any]:
    """Record batches of Arrow's stream format, which `datasets` writes, or of its file format."""
    import pyarrow as pa

    try:
        yield from pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _column(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_cell(cell) for cell in column]


def _cell(cell: Any) -> Any:
    """A cell's value; its text, where Python has no type for it (nanoseconds)."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        import pyarrow as pa

        try:
            text = cell.cast(pa.string()).as_py()
        except (pa.ArrowException, ValueError, OverflowError):
            return Unreadable(str(error))
        return Unreadable(text) if text.startswith("<value out of range") else text
