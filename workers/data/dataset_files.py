"""Reads the raw rows of data files: the same rows in the same order from every file format.

    x.jsonl  x.json  x.parquet  x.arrow, the first two also gzipped     a file
    saved/                             a `datasets` folder as save_to_disk writes it, or a folder of such files
    saved/test, folder/test            one split of a folder that holds several

A null value counts as absent, because tables have a null wherever another row has a value.

Why not the `datasets` library, whose files it reads: an error names the file and the line, a digest of the rows is the
same for every format, and rows are streamed from where they are. `datasets` infers one schema for all rows, writes a
second copy of the data into its cache, and needs pandas and network clients that nothing else here uses.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec


class DataError(ValueError):
    """A data file that can't be used. The message names file, row and what is wrong."""


class Record(NamedTuple):
    """One raw row."""

    place: str  # for errors: line "x.jsonl:3" or row "x.parquet: row 3", both counted from 1
    values: dict[str, Any]  # without nulls, at any depth


_LINES = (".jsonl", ".ndjson", ".json")
_TABLES = (".parquet", ".arrow")
_ROWS_AT_ONCE = 1024  # rows read at once from a parquet file, because rows may hold images
_KINDS = (*_LINES, *(f"{kind}.gz" for kind in _LINES), *_TABLES)
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "dev", "val"), "validation")
_JSON = msgspec.json.Decoder(dict[str, Any])


def records(path: str | Path) -> Iterator[Record]:
    """All rows in order. Raises DataError at the first row that can't be read."""
    for file in _files(Path(path)):
        yield from _table(file) if file.suffix in _TABLES else _lines(file)


def digest_of_rows(path: str | Path) -> str:
    """Digest of the rows and their order, the same for every file format. Raises DataError."""
    digest = hashlib.sha256()
    encoder = msgspec.json.Encoder(order="sorted")
    for record in records(path):
        digest.update(encoder.encode(record.values) + b"\n")
    return digest.hexdigest()


# --- which files


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_of_folder(path)
    if path.name in _SPLITS.values() and not path.exists() and path.parent.is_dir():
        return _by_split(_data_files(path.parent), path.parent).get(path.name, [path])
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "state.json").exists():
        return _saved_files(folder)
    files = _data_files(folder)
    if not files:
        raise DataError(f"{folder}: a folder without data; it may hold {', '.join(_KINDS)} files")
    splits = _by_split(files, folder)
    if len(splits) > 1:
        names = ", ".join(str(folder / name) for name in sorted(splits) if name)
        raise DataError(f"{folder}: has several splits, name one of them: {names}")
    if nested := sorted({file.parent for file in files if (file.parent / "state.json").exists()}):
        return [file for split in nested for file in _saved_files(split)]
    return files


def _saved_files(folder: Path) -> list[Path]:
    """The files of a saved data set, in the order of its state.json."""
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes(), type=_State)
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{folder / 'state.json'}: can't be read: {error}") from error
    return [folder / file.filename for file in state.data_files]


class _File(msgspec.Struct):
    filename: str


class _State(msgspec.Struct):
    """The state.json of save_to_disk."""

    data_files: list[_File] = msgspec.field(name="_data_files")


def _data_files(folder: Path) -> list[Path]:
    """The data files in path order, which is the order of shards; no hidden files, caches or save_to_disk metadata."""
    notes = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.endswith(_KINDS) and p.name not in notes)
    return [p for p in found if not any(part.startswith((".", "cache-")) for part in p.relative_to(folder).parts)]


def _by_split(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, by their names in the folder, e.g. data/train-00000-of-00002.parquet or test/x.jsonl."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z]+", str(file.relative_to(folder)).lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), "")
        splits.setdefault(split, []).append(file)
    return splits


# --- what is in them


def _lines(path: Path) -> Iterator[Record]:
    """One JSON object per line, ignoring empty lines; or one array of objects, which is read into memory."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.name.endswith((".json", ".json.gz")) and file.peek(1).lstrip()[:1] == b"[":
                yield from _array(path, file.read())
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _array(path: Path, data: bytes) -> Iterator[Record]:
    try:
        objects = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array of objects: {error}") from error
    for number, raw in enumerate(objects, 1):
        yield _object(bytes(raw), f"{path}: row {number}")


def _object(text: bytes, place: str) -> Record:
    try:
        return Record(place, _without_nulls(_JSON.decode(text)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object: {error}") from error


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
            batches = pq.ParquetFile(source).iter_batches(_ROWS_AT_ONCE) if is_parquet else _arrow(source)
            for batch in batches:
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}: row {number}", _without_nulls(values))
    except (
        OSError,
        pa.ArrowException,
        ValueError,
        OverflowError,
    ) as error:  # the last two: values that Python has no type for
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


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
        case list():
            return [_without_nulls(inner) for inner in value]
        case _:
            return value
