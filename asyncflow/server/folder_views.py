"""What a run's folder holds, for clients: files, the ends of logs, samples. Blocking; nothing is changed."""

from __future__ import annotations

import os
import sqlite3
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocols.control.problems import NotFound
from protocols.control.runs import Artifact, Sample

HIDDEN = frozenset({"endpoint.json", "run.lock"})  # the first has a token
MOST_FILES = 10_000


def artifacts_of(folder: Path) -> list[Artifact]:
    """The files of a run by their paths, at most `MOST_FILES`."""
    found: list[Artifact] = []
    for path in _files(folder):
        try:
            stat = path.stat()
        except OSError:  # a run that goes on renames and removes files
            continue
        found.append(Artifact(str(path.relative_to(folder)), stat.st_size, stat.st_mtime))
        if len(found) == MOST_FILES:
            break
    return sorted(found, key=lambda artifact: artifact.path)


def _files(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in names if _is_open(path := Path(here, name)))


def _is_open(path: Path) -> bool:
    return path.name not in HIDDEN and not path.name.startswith(".") and not path.is_symlink()


def file_in(folder: Path, path: str) -> Path:
    """A file of a run. Raises NotFound for any other path."""
    try:
        root = folder.resolve()
        found = (root / path).resolve()
        inside = found.relative_to(root)
        if found.is_file() and not any(part in HIDDEN or part.startswith(".") for part in inside.parts):
            return found
    except (ValueError, OSError):  # outside of the folder; not a path at all
        pass
    raise NotFound(f"run {folder.name} has no file {path[:200]!r}")


def log_of(folder: Path, service: str, last_bytes: int) -> bytes:
    """The end of a service's log. Raises NotFound."""
    with file_in(folder, f"logs/{service}.log").open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - last_bytes, 0))
        return file.read(last_bytes)


def recipe_of(folder: Path) -> dict[str, Any]:
    """The run's resolved recipe."""
    return tomllib.loads(file_in(folder, "recipe.toml").read_text("utf-8"))


def samples_of(folder: Path, state: str, after: int, limit: int) -> list[Sample]:
    """Samples of the ledger by rising id."""
    where, values = "sample_id > ?", [after]
    if state:
        where, values = f"{where} AND state = ?", [*values, state]
    return _samples(folder, f"{where} ORDER BY sample_id LIMIT ?", [*values, limit])


def sample_of(folder: Path, sample_id: int) -> Sample:
    """One sample. Raises NotFound."""
    for sample in _samples(folder, "sample_id = ?", [sample_id]):
        return sample
    raise NotFound(f"run {folder.name} has no sample {sample_id}")


def _samples(folder: Path, condition: str, values: list[Any]) -> list[Sample]:
    path = folder / "ledger.db"
    if not path.exists():
        return []
    query = f"SELECT sample_id, state, reason, attempt, admitted_version, step, term FROM samples WHERE {condition}"
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            return [Sample(*row) for row in connection.execute(query, values)]
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
