"""A checkpoint is one folder with one manifest. It counts only if all of it is there, byte for byte.

    checkpoints/step_000010/            written as .step_000010.partial, fsynced, then renamed
        manifest.json                   step, term, cursor, recipe digest, the sha256 of every file, and its own
        ledger.db                       the truth on restore
        policy/ critic/                 weights, optimizer and generator state of each trained model
        advantage/                      state of the batch function, if it has any

The newest checkpoint is found by looking for valid manifests, never by a pointer that could be ahead of the data.

Other programs leave files in these folders: .DS_Store, .nfs*, a copy under step_000010.bak. Nothing here takes them for
its own, and nothing removes them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

MANIFEST = "manifest.json"
FORMAT = 2  # of run folders and of the checkpoints in them; no other format is read
_STEP = re.compile(r"step_(\d{6,})")
_PARTIAL, _ABANDONED = re.compile(r"\.step_\d{6,}\.partial"), re.compile(r"\.step_\d{6,}\.abandoned(\.\d+)?")
_READ_BY_NAME = (".safetensors", ".json")  # suffixes by which a model's loader would pick up a file that is too many


class CheckpointError(Exception):
    """No checkpoint can be used; the message says why for each one."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint holds."""

    step: int
    term: int
    cursor: int
    recipe_digest: str
    files: dict[str, str]  # path below the folder -> sha256
    format: int = FORMAT
    seal: str = ""  # sha256 of this manifest without its seal: otherwise a flipped digit of `cursor` would go unnoticed


def folder_of(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step_{step:06d}"


def begin(root: Path, step: int) -> Path:
    """Create an empty partial folder and remove what earlier attempts have left."""
    clear_partial(root)
    for abandoned in _matching(root, _ABANDONED):
        _remove(abandoned)
    partial = root / f".step_{step:06d}.partial"
    partial.mkdir(parents=True, exist_ok=True)  # a network file system may still hold a file that was open, as .nfs*
    return partial


def clear_partial(root: Path) -> None:
    """Remove checkpoints that were not finished. Raises OSError if a file of theirs stays."""
    for partial in _matching(root, _PARTIAL):
        shutil.rmtree(partial, ignore_errors=True)
        if partial.exists() and (left := next(_files(partial), None)) is not None:
            raise OSError(errno.ENOTEMPTY, "this file of an unfinished checkpoint can't be removed", str(left))


def finish(partial: Path, root: Path, step: int, term: int, cursor: int, recipe_digest: str) -> tuple[Path, int]:
    """Hash and sync every file, write the manifest, rename. Returns the folder and its size in bytes.

    Checkpoints that an abandoned lineage left at this step or a later one are removed: they must neither be taken as
    the newest nor be counted by `prune`.
    """
    files: dict[str, str] = {}
    size = 0
    for path in sorted(_files(partial)):
        files[str(path.relative_to(partial))] = _digest(path)
        size += path.stat().st_size
        _sync(path)
    sealed = _sealed(Manifest(step, term, cursor, recipe_digest, files))
    (partial / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(sealed)))
    _sync(partial / MANIFEST)
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
        _sync(folder)
    final = folder_of(root, step)
    # Renamed, not removed: two renames leave the least time in which a crash would find no checkpoint.
    abandoned = [folder.rename(_free(root / f".{folder.name}.abandoned")) for folder in _folders(root, from_step=step)]
    partial.rename(final)
    _sync(root)
    for folder in abandoned:
        _remove(folder)
    return final, size


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written. Raises CheckpointError.

    Files that are not in the manifest are another program's, unless a model's loader would read them.
    """
    manifest = _manifest_of(folder)
    if manifest.format != FORMAT:
        raise CheckpointError(f"{folder}: was written in format {manifest.format}, this asyncflow reads {FORMAT}")
    if folder.name != folder_of(folder.parent, manifest.step).name:
        raise CheckpointError(f"{folder}: holds step {manifest.step}, its name says another")
    try:
        present = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST}
        if missing := sorted(set(manifest.files) - present):
            raise CheckpointError(f"{folder}: files of the manifest are missing: {missing[:5]}")
        if extra := sorted(name for name in present - set(manifest.files) if name.endswith(_READ_BY_NAME)):
            raise CheckpointError(f"{folder}: files that the manifest does not list, move them away: {extra[:5]}")
        for name, digest in manifest.files.items():
            if _digest(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: is damaged, its sha256 is not the manifest's")
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: can't be read: {error.strerror or error}") from error
    return manifest


def newest(root: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest valid checkpoint, and the defect of every newer one. Raises CheckpointError if there is none."""
    damaged: list[str] = []
    try:
        folders = _folders(root)
    except OSError as error:
        raise CheckpointError(f"{root}: can't be read: {error.strerror}") from error
    for folder in folders:
        try:
            return folder, read(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    raise CheckpointError(f"{root} holds no valid checkpoint: {'; '.join(damaged) or 'it is empty'}")


def terms(root: Path) -> Iterator[int]:
    """The terms in which the checkpoints were written whose manifests can be read; their files are not."""
    for folder in _folders(root):
        with contextlib.suppress(CheckpointError):
            yield _manifest_of(folder).term


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: remove none)."""
    for folder in _folders(root)[keep:] if keep else []:
        _remove(folder)


def _folders(root: Path, from_step: int = 0) -> list[Path]:
    """The checkpoints of a step and later ones, the newest first."""
    found = {int(folder.name.removeprefix("step_")): folder for folder in _matching(root, _STEP)}
    return [found[step] for step in sorted(found, reverse=True) if step >= from_step]


def _matching(root: Path, name: re.Pattern[str]) -> list[Path]:
    """The folders in `root` with such a name; none where there is no `root`. Raises OSError if it can't be read."""
    try:
        with os.scandir(root) as entries:
            return [Path(entry.path) for entry in entries if name.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []


def _files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint; hidden ones are another program's. Raises OSError if a folder can't be read."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _remove(folder: Path) -> None:
    """Remove the files that a checkpoint's manifest lists, and the folders that are empty then.

    Without a manifest nothing says whose the files are: they stay.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    try:
        listed: Iterable[str] = _manifest_of(folder).files
    except CheckpointError:
        return
    for name in listed:
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink()  # last: after a crash the next attempt still knows which files to remove
    for inner in sorted({folder, *((folder / name).parent for name in listed)}, reverse=True):
        with contextlib.suppress(OSError):  # it holds another program's files
            inner.rmdir()


def _free(path: Path) -> Path:
    """The path, or the first of path.1, path.2, ... that is not there."""
    tried = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, 1000))]
    return next(candidate for candidate in tried if not candidate.exists())


def _manifest_of(folder: Path) -> Manifest:
    """A checkpoint's manifest, whose seal is intact. Raises CheckpointError."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST}: can't be read: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # bytes that are no UTF-8 give a ValueError
        raise CheckpointError(f"{folder / MANIFEST}: is damaged: {error}") from error
    if manifest != _sealed(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: is damaged, it does not match its own seal")
    if outside := [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise CheckpointError(f"{folder / MANIFEST}: lists files outside the checkpoint: {outside[:5]}")
    return manifest


def _sealed(manifest: Manifest) -> Manifest:
    bare = msgspec.json.encode(msgspec.structs.replace(manifest, seal=""))
    return msgspec.structs.replace(manifest, seal=hashlib.sha256(bare).hexdigest())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
