"""The run folder: its lock allows one controller at a time, its term rises with every start."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import msgspec

from asyncflow.control.store import checkpoint
from asyncflow.recipe.config import BadInput, Recipe, load_recipe, recipe_text
from workers.data.dataset_files import digest_of_rows


class Start(msgspec.Struct, frozen=True):
    """How a run starts: its term, and the checkpoint that it restores ("" for a new run)."""

    term: int
    restore: str
    warnings: list[str] = []


def new_folder(recipe: Recipe) -> Path:
    """A path that does not exist yet, named after the recipe and the time."""
    stem = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    root = Path(recipe.folder)
    return next(p for i in range(1000) if not (p := root / (stem if not i else f"{stem}-{i}")).exists())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[TextIO]:
    """Lock the folder. Raises BadInput if another process holds the lock; the lock ends with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "run.lock").open("w")
    except OSError as error:
        raise BadInput(f"run folder {folder}: can't be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BadInput(f"run {folder}: another process is running it") from None
    try:
        yield file
    finally:
        file.close()


def begin_fresh(folder: Path, recipe: Recipe) -> Start:
    """Lay out the folder of a new run. Raises BadInput if it already holds a run."""
    if (folder / "ledger.db").exists() or (folder / "recipe.toml").exists():
        raise BadInput(f"run folder {folder} already holds a run: resume it, or choose another folder")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "format").write_text(str(checkpoint.FORMAT))
    (folder / "recipe.toml").write_text(recipe_text(recipe))
    return Start(_next_term(folder), "")


def begin_resumed(folder: Path, recipe: Recipe, *, allow_fresh: bool = False) -> Start:
    """Replace the ledger by that of the newest valid checkpoint; the old one moves to lineage/.

    Raises BadInput if no checkpoint is valid and `allow_fresh` is false.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    try:
        path, manifest, damaged = checkpoint.newest(folder / "checkpoints")
        warnings = [f"a newer checkpoint can't be used: {d}" for d in damaged]
        if manifest.recipe_digest != digest_of(recipe):
            raise BadInput(
                f"resume {folder}: algorithm, seed, samples_per_prompt or the training data are not those of the "
                f"checkpoint of step {manifest.step}: its sample ids would mean other samples"
            )
    except checkpoint.CheckpointError as error:
        if not allow_fresh:
            raise BadInput(f"resume {folder}: {error}; --allow-fresh starts it from the beginning") from error
        path, manifest, warnings = None, None, [str(error)]
    if manifest is not None and manifest.step > recipe.steps:
        raise BadInput(
            f"resume {folder}: steps = {recipe.steps} in its recipe.toml, but {path} holds {manifest.step} committed "
            f"steps: want {manifest.step} or more"
        )
    term = _next_term(folder)
    _set_ledger_aside(folder, term)
    if path is not None:
        shutil.copyfile(path / "ledger.db", folder / "ledger.db")
    return Start(term, str(path) if path is not None else "", warnings)


def recipe_of(folder: Path) -> Recipe:
    """Load the resolved recipe of an existing run. Raises BadInput, also for a run folder of another format."""
    if not (folder / "recipe.toml").exists():
        raise BadInput(f"{folder} is no run folder: it has no recipe.toml")
    _check_format(folder)  # first: an older recipe may have keys that mean something else now
    return load_recipe(folder / "recipe.toml")


def _check_format(folder: Path) -> None:
    path = folder / "format"
    found = path.read_text().strip() if path.exists() else "1"  # format 1 had no such file
    if found == str(checkpoint.FORMAT):
        return
    age = "an older" if found == "1" else "another"
    raise BadInput(
        f"run folder {folder} was written by {age} asyncflow (format {found}, this one reads {checkpoint.FORMAT}): "
        f"finish the run with the version that wrote it, then start a new run from the policy that it exports to "
        f"{folder}/policy"
    )


def digest_of(recipe: Recipe) -> str:
    """Digest of the part of a recipe that gives sample ids their meaning; a checkpoint stores it."""
    data = digest_of_rows(recipe.data.train)
    identity = [recipe.algorithm, recipe.seed, recipe.samples_per_prompt, recipe.data.prompt, data]
    return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()


def _next_term(folder: Path) -> int:
    """Take the next term. Terms start at 0 and are never reused, not even after a start that failed at once."""
    path = folder / "term"
    term = int(path.read_text()) + 1 if path.exists() else 0
    partial = folder / ".term.partial"
    with partial.open("w") as file:
        file.write(str(term))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return term


def _set_ledger_aside(folder: Path, term: int) -> None:
    lineage = folder / "lineage"
    lineage.mkdir(exist_ok=True)
    for suffix in ("", "-wal", "-shm"):
        path = folder / f"ledger.db{suffix}"
        if path.exists():
            path.rename(lineage / f"before_term_{term}.ledger.db{suffix}")
