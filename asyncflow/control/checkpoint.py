"""A checkpoint is one folder with one manifest: all of it is there, byte for byte, or it does not count.

    checkpoints/step_000010/            written as .step_000010.partial, fsynced, then renamed
        manifest.json                   step, term, cursor, recipe digest, and the sha256 of every file
        ledger.db                       the truth on restore
        policy/ critic/                 weights, optimizer and generator state of each trained model

The newest is found by looking for valid manifests, never by a pointer that could be ahead of the data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

MANIFEST = "manifest.json"


class CheckpointError(Exception):
    """No checkpoint can be used, and why each one can't."""


class Manifest(msgspec.Struct, frozen=True):
    """What a checkpoint holds."""

    step: int
    term: int
    cursor: int
    recipe_digest: str
    files: dict[str, str]  # path below the folder -> sha256
    format: int = 1


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:06d}"


def begin(root: Path, step: int) -> Path:
    """An empty partial folder; a leftover of an earlier attempt is removed."""
    partial = root / f".step_{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path, root: Path, step: int, term: int, cursor: int, recipe_digest: str) -> tuple[Path, int]:
    """Hash and sync every file, write the manifest, rename. Returns the folder and its size in bytes."""
    files: dict[str, str] = {}
    size = 0
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        files[str(path.relative_to(partial))] = _digest(path)
        size += path.stat().st_size
        _sync(path)
    manifest = partial / MANIFEST
    manifest.write_bytes(msgspec.json.format(msgspec.json.encode(Manifest(step, term, cursor, recipe_digest, files))))
    _sync(manifest)
    for folder in [partial, *(p for p in partial.rglob("*") if p.is_dir())]:
        _sync(folder)
    final = folder_of(root, step)
    if final.exists():  # of an abandoned lineage that came this far
        shutil.rmtree(final)
    partial.rename(final)
    _sync(root)
    return final, size


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written. Raises CheckpointError."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}") from None
    except (msgspec.MsgspecError, OSError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if present != set(manifest.files):
        raise CheckpointError(f"{folder}: files differ from the manifest: {sorted(present ^ set(manifest.files))[:5]}")
    for name, digest in manifest.files.items():
        if _digest(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: is damaged, its sha256 is not the manifest's")
    return manifest


def newest(root: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest valid checkpoint, and what is wrong with every newer one. Raises CheckpointError if there is none."""
    damaged: list[str] = []
    for folder in _folders(root):
        try:
            return folder, read(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    raise CheckpointError(f"{root} holds no valid checkpoint: {'; '.join(damaged) or 'it is empty'}")


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: keep all)."""
    for folder in list(_folders(root))[keep:] if keep else []:
        shutil.rmtree(folder)


def _folders(root: Path) -> Iterator[Path]:
    return iter(sorted(root.glob("step_*"), reverse=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
