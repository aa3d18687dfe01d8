"""A checkpoint is one folder with one manifest. It counts only if all of it is there, byte for byte.

    checkpoints/step_000010/            written as .step_000010.partial, fsynced, then renamed
        manifest.json                   step, term, cursor, recipe digest, the sha256 of every file, and its own
        ledger.db                       the truth on restore
        policy/ critic/                 weights, optimizer and generator state of each trained model
        advantage/                      state of the batch function, if it has any

The newest checkpoint is found by looking for valid manifests, never by a pointer that could be ahead of the data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

MANIFEST = "manifest.json"
FORMAT = 2  # of run folders and of the checkpoints in them; no other format is read


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
    """Create an empty partial folder and remove those of earlier attempts."""
    for leftover in [*root.glob(".step_*.partial"), *root.glob(".step_*.abandoned")]:
        shutil.rmtree(leftover)
    partial = root / f".step_{step:06d}.partial"
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path, root: Path, step: int, term: int, cursor: int, recipe_digest: str) -> tuple[Path, int]:
    """Hash and sync every file, write the manifest, rename. Returns the folder and its size in bytes.

    Checkpoints that an abandoned lineage left at this step or a later one are removed: they must neither be taken as
    the newest nor be counted by `prune`.
    """
    files: dict[str, str] = {}
    size = 0
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        files[str(path.relative_to(partial))] = _digest(path)
        size += path.stat().st_size
        _sync(path)
    sealed = _sealed(Manifest(step, term, cursor, recipe_digest, files))
    (partial / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(sealed)))
    _sync(partial / MANIFEST)
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
        _sync(folder)
    final = folder_of(root, step)
    abandoned = [f for f in _folders(root) if f.name >= final.name]
    # Renamed, not removed: two renames leave the least time in which a crash would find no checkpoint.
    for folder in abandoned:
        folder.rename(root / f".{folder.name}.abandoned")
    partial.rename(final)
    _sync(root)
    for folder in abandoned:
        shutil.rmtree(root / f".{folder.name}.abandoned")
    return final, size


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written. Raises CheckpointError."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}") from None
    except (msgspec.MsgspecError, OSError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    if manifest != _sealed(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: is damaged, it does not match its own seal")
    if manifest.format != FORMAT:
        raise CheckpointError(f"{folder}: was written in format {manifest.format}, this asyncflow reads {FORMAT}")
    if folder.name != folder_of(folder.parent, manifest.step).name:
        raise CheckpointError(f"{folder}: holds step {manifest.step}, its name says another")
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if present != set(manifest.files):
        raise CheckpointError(f"{folder}: files differ from the manifest: {sorted(present ^ set(manifest.files))[:5]}")
    for name, digest in manifest.files.items():
        if _digest(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: is damaged, its sha256 is not the manifest's")
    return manifest


def newest(root: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest valid checkpoint, and the defect of every newer one. Raises CheckpointError if there is none."""
    damaged: list[str] = []
    for folder in _folders(root):
        try:
            return folder, read(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    raise CheckpointError(f"{root} holds no valid checkpoint: {'; '.join(damaged) or 'it is empty'}")


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: remove none)."""
    for folder in list(_folders(root))[keep:] if keep else []:
        shutil.rmtree(folder)


def _folders(root: Path) -> Iterator[Path]:
    return iter(sorted((f for f in root.glob("step_*") if f.is_dir()), reverse=True))


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
