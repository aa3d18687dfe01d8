"""Reads the raw rows of data files and folders: the same rows in the same order from every file format.

    x.jsonl  x.json  x.csv  x.tsv, also .gz or .zst; x.parquet  x.arrow    a file (workers.data.file_rows)
    saved/                             a `datasets` folder as save_to_disk writes it, or a folder of such files
    saved/test, folder/test            one split of a folder that holds several
    x.json/test                        one array of a .json file whose object holds several

A null value counts as absent, because tables have a null wherever another row has a value.

Why pyarrow and not the `datasets` library, whose files it reads: an error names the file and the line, a digest of the
rows is the same for every format, and rows are streamed from where they are. `datasets` infers one schema for all rows
(a text "007" in a CSV becomes 7), writes a second copy of the data into its cache, and needs pandas and network clients
that nothing else here uses.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from workers.data.file_rows import KINDS, json_of, rows_of
from workers.data.record import DataError, Record

__all__ = ["DataError", "Record", "digest_of_rows", "places_of", "records"]

_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "dev", "val"), "validation")


def records(path: str | Path) -> Iterator[Record]:
    """All rows in order. Raises DataError at the first row that can't be read."""
    for file in _files(Path(path)):
        yield from rows_of(file)


def places_of(path: str | Path, rows: list[int]) -> list[str]:
    """Where these rows stand, counted from 0 and rising. Raises DataError."""
    found, before = iter(records(path)), 0
    places: list[str] = []
    for row in rows:
        places += [record.place for record in islice(found, row - before, row - before + 1)]
        before = row + 1
    return places


def digest_of_rows(path: str | Path) -> str:
    """Digest of the rows and their order, the same for every file format. Raises DataError."""
    digest = hashlib.sha256()
    for record in records(path):
        digest.update(json_of(record.values) + b"\n")
    return digest.hexdigest()


# --- which files


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_of_folder(path)
    if path.name in _SPLITS.values() and not path.exists() and path.parent.is_dir():
        split = _by_split(_data_files(path.parent), path.parent).get(path.name)
        return _of_one_configuration(split, path) if split else [path]
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / "state.json").exists():
        return _saved_files(folder)
    files = _data_files(folder)
    if not files:
        raise DataError(f"{folder}: a folder without data; it may hold {', '.join(KINDS)} files")
    splits = _by_split(files, folder)
    if len(splits) > 1:
        names = ", ".join(str(folder / name) for name in sorted(splits) if name)
        raise DataError(f"{folder}: has several splits, name one of them: {names}")
    if any((file.parent / "state.json").exists() for file in files):
        return _saved_files(_of_one_configuration(files, folder / next(iter(splits)))[0].parent)
    return files if "" in splits else _of_one_configuration(files, folder / next(iter(splits)))


def _saved_files(folder: Path) -> list[Path]:
    """The files of a saved data set, in the order of its state.json."""
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes(), type=_State)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
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
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.endswith(KINDS) and p.name not in notes)
    return [p for p in found if not any(part.startswith((".", "cache-")) for part in p.relative_to(folder).parts)]


def _by_split(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, by their names in the folder, e.g. data/train-00000-of-00002.parquet or test/x.jsonl."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z]+", str(file.relative_to(folder)).lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), "")
        splits.setdefault(split, []).append(file)
    return splits


def _of_one_configuration(files: list[Path], split: Path) -> list[Path]:
    """The files of a split, if they are not spread over folders, as the configurations of a data set are."""
    folders = {Path(*(p for p in file.relative_to(split.parent).parts[:-1] if p not in _SPLITS)) for file in files}
    if len(folders) == 1:
        return files
    named = {f.parent / split.name if split.name in _by_split([f], f.parent) else f.parent for f in files}
    names = ", ".join(map(str, sorted(named)))
    raise DataError(f"{split}: its files are in several folders, name one of them: {names}")
