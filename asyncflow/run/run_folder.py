"""The run folder: its lock allows one controller at a time, its term rises with every start and every rollback.

A run starts from step 0, which is the recipe: its models as they are in their folders. So step 0 needs no checkpoint; a
run that ended before it wrote one starts from there again, with whatever its recipe then says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec

from asyncflow.control.store import checkpoint
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.store.run_log import ENDED
from asyncflow.control.store.run_store import EXPORT_PARTIAL
from asyncflow.control.store.storage import StorageFailed, storing
from asyncflow.observe.log import open_log
from asyncflow.recipe.changes import Change, changes
from asyncflow.recipe.config import BadInput, Recipe, load_recipe, recipe_text
from asyncflow.run.terms import next_term, set_ledger_aside
from workers.data.dataset_files import digest_of_rows

RECIPE, CHANGES, LOCK, LEDGER_PARTIAL = "recipe.toml", "changes.jsonl", "run.lock", ".ledger.partial"


class Start(msgspec.Struct, frozen=True):
    """How a run starts: its term, and the checkpoint that it restores ("" for one that starts from step 0)."""

    term: int
    restore: str
    warnings: list[str] = []


def absolute(folder: str | Path) -> Path:
    """The path for processes that have another working directory, as those of a Ray that was there already."""
    try:
        return Path(folder).absolute()
    except FileNotFoundError:
        raise BadInput(f"run folder {folder}: the working directory was removed: change to one that exists") from None


def new_folder(recipe: Recipe) -> Path:
    """A path that does not exist yet, named after the recipe and the time."""
    stem = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    root = absolute(recipe.folder)
    return next(p for i in range(1000) if not (p := root / (stem if not i else f"{stem}-{i}")).exists())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[TextIO]:
    """Lock the folder. Raises BadInput if another process holds the lock; the lock ends with its process."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")  # not "w": it holds the number of another process that may run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BadInput(f"run {folder}: another process is running it") from None
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        yield file
    finally:
        file.close()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise BadInput where the folder can't be written, as on a full disk."""
    try:
        with storing("run folder", folder):
            yield
    except StorageFailed as error:
        raise BadInput(str(error)) from error


def open_controller_log(folder: Path) -> logging.Logger:
    """The log of the run's controller. Raises BadInput."""
    with writing(folder):
        return open_log(folder / "logs" / "controller.log")


def holds_run(folder: Path) -> bool:
    """Whether a run was started in a folder."""
    return (folder / "ledger.db").exists() or (folder / RECIPE).exists()


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in a folder has made all steps of the recipe and exported its policy."""
    if not (folder / "policy").is_dir():
        return False
    try:
        _, manifest, damaged = checkpoint.newest(folder / "checkpoints")
    except checkpoint.CheckpointError:
        return False
    return manifest.step >= recipe.steps and not damaged


def begin_fresh(folder: Path, recipe: Recipe) -> Start:
    """Lay out the folder of a new run. Raises BadInput if it already holds a run."""
    if holds_run(folder):
        raise BadInput(f"run folder {folder} already holds a run: resume it, or choose another folder")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "format").write_text(str(checkpoint.FORMAT))
    _write_recipe(folder, recipe)
    return Start(next_term(folder)[0], "")


def begin_resumed(folder: Path, recipe: Recipe, *, allow_fresh: bool = False) -> Start:
    """Replace the ledger by that of the newest valid checkpoint; the old one moves to lineage/.

    `recipe` is the one to go on with. Where it differs from the folder's, the differences are recorded in
    changes.jsonl. A run that has not written a checkpoint yet starts from step 0; if all of its checkpoints are damaged
    or gone it does so only with `allow_fresh`.

    Raises BadInput, and changes nothing, if no checkpoint is valid, or for a change that a checkpoint does not allow.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    _clear_partial(folder)
    changed = changes(recipe_of(folder), recipe)
    found = _newest(folder, allow_fresh=allow_fresh)
    if found.manifest is not None:
        _check_changes(folder, changed, recipe, found.manifest)
    start = _take_term(folder, found)
    if changed:
        changed_at = [f"changed at step {found.step}: {change}" for change in changed]
        start = msgspec.structs.replace(start, warnings=[*start.warnings, *changed_at])
        _record(folder, start.term, found.step, changed)
        _write_recipe(folder, recipe)
    switch_ledger(folder, start)
    return start


def begin_rollback(folder: Path) -> Start:
    """Take the next term of a run that goes on in its process; its ledger stays until `switch_ledger`.

    It starts where a resume would. Raises BadInput if no checkpoint is valid.
    """
    return _take_term(folder, _newest(folder))


class _Newest(NamedTuple):
    """Where a run goes on: a checkpoint, or without one step 0."""

    path: Path | None
    manifest: checkpoint.Manifest | None
    warnings: list[str]

    @property
    def step(self) -> int:
        return self.manifest.step if self.manifest is not None else 0


def _newest(folder: Path, *, allow_fresh: bool = False) -> _Newest:
    """The newest valid checkpoint. Raises BadInput if there is none where one should be, unless `allow_fresh`."""
    try:
        path, manifest, damaged = checkpoint.newest(folder / "checkpoints")
    except checkpoint.CheckpointError as error:
        committed = _committed_steps(folder)
        if not (allow_fresh or _wrote_no_checkpoint(folder, recipe_of(folder), committed)):
            raise BadInput(f"resume {folder}: {error}; --allow-fresh starts it from the beginning") from error
        lost = f", {committed} steps are trained again" if committed else ""
        return _Newest(None, None, [f"starts from the beginning{lost}: {error}"])
    return _Newest(path, manifest, [f"a newer checkpoint can't be used: {d}" for d in damaged])


def _take_term(folder: Path, found: _Newest) -> Start:
    if found.path is not None:  # first: a full disk must not end this between two ledgers
        shutil.copyfile(found.path / "ledger.db", folder / LEDGER_PARTIAL)
    term, reused = next_term(folder)
    warnings = [*found.warnings, *([reused] if reused else [])]
    return Start(term, str(found.path) if found.path is not None else "", warnings)


def switch_ledger(folder: Path, start: Start) -> None:
    """Set the ledger of the last term aside, which no process has open; the checkpoint's takes its place."""
    set_ledger_aside(folder, start.term)
    if start.restore:
        (folder / LEDGER_PARTIAL).rename(folder / "ledger.db")


def _check_changes(folder: Path, changed: list[Change], recipe: Recipe, manifest: checkpoint.Manifest) -> None:
    fixed = [f"{change}: {change.fixed_because}" for change in changed if change.fixed_because]
    if fixed:
        raise BadInput(f"resume {folder}: its checkpoint of step {manifest.step} does not allow {'; '.join(fixed)}")
    if manifest.recipe_digest != digest_of(recipe):
        raise BadInput(
            f"resume {folder}: algorithm, seed, samples_per_prompt, the training data or, with data.overlong = 'skip', "
            f"the room for a prompt are not those of the checkpoint of step {manifest.step}: its sample ids would mean "
            "other samples"
        )
    if manifest.step > recipe.steps:
        raise BadInput(
            f"resume {folder}: steps = {recipe.steps}, but its checkpoint holds {manifest.step} committed steps: "
            f"want {manifest.step} or more"
        )


def _wrote_no_checkpoint(folder: Path, recipe: Recipe, committed: int) -> bool:
    """Whether the run ended before its first checkpoint: there is none, nor should there be one by its recipe."""
    every = recipe.checkpoints.every
    return not any((folder / "checkpoints").glob("step_*")) and (not every or committed <= every)


def _committed_steps(folder: Path) -> int:
    """The number of committed steps in the live ledger; 0 where it can't be read."""
    if not (folder / "ledger.db").exists():
        return 0
    try:
        ledger = Ledger(folder / "ledger.db")
    except sqlite3.Error:
        return 0
    try:
        return ledger.version
    finally:
        ledger.close()


def _record(folder: Path, term: int, step: int, changed: list[Change]) -> None:
    with (folder / CHANGES).open("ab") as file:
        for change in changed:
            line = {"term": term, "step": step, "key": change.key, "before": change.before, "after": change.after}
            file.write(msgspec.json.encode(line) + b"\n")


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    partial = folder / f".{RECIPE}.partial"
    partial.write_text(recipe_text(recipe))
    partial.replace(folder / RECIPE)


def recipe_of(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the resolved recipe of an existing run. Raises BadInput, also for a run folder of another format."""
    if not (folder / RECIPE).exists():
        raise BadInput(f"{folder} is no run folder: it has no {RECIPE}")
    _check_format(folder)  # first: an older recipe may have keys that mean something else now
    return load_recipe(folder / RECIPE, overrides)


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
    data: list[Any] = [recipe.data.prompt, digest_of_rows(recipe.data.sets[0].path)]
    if not isinstance(recipe.data.train, str):
        data = [[s.prompt, digest_of_rows(s.path), s.weight] for s in recipe.data.sets]
    if recipe.data.overlong == "skip":  # which rows these are depends on the room for a prompt
        data += [recipe.generation.max_model_tokens, recipe.generation.max_tokens]
    identity = [recipe.algorithm, recipe.seed, recipe.samples_per_prompt, *data]
    return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()


def _clear_partial(folder: Path) -> None:
    """Remove what the run's last process left unfinished, and what it said of its end."""
    checkpoint.clear_partial(folder / "checkpoints")
    (folder / ENDED).unlink(missing_ok=True)
    shutil.rmtree(folder / EXPORT_PARTIAL, ignore_errors=True)
    (folder / LEDGER_PARTIAL).unlink(missing_ok=True)
