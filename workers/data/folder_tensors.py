"""The tensors of a transformers folder, read from the headers of its safetensors files: names, shapes, dtypes.

A header is a few kilobytes at the front of a file, so this takes milliseconds where reading a model takes minutes, and
finds what is wrong with a download: pointers instead of files, missing and truncated files, tensors that nobody wrote.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # bytes, the format's own bound
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    dtype: str  # safetensors' word: "F32", "BF16"
    shape: tuple[int, ...]


class BadFolder(ValueError):
    """A model folder whose files can't be used. The message says which, why, and what to do."""


def refuse_pointers(folder: str | Path) -> None:
    """Raise BadFolder if a file is git-lfs's pointer to the real one, which `git clone` leaves without git-lfs."""
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_POINTER):
            raise BadFolder(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in {folder}, or download it "
                "again with `hf download`"
            )


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors that loading the folder finds, by name. Raises BadFolder."""
    folder = Path(folder)
    refuse_pointers(folder)
    if (folder / ONE_FILE).exists():
        return _header(folder / ONE_FILE)
    if not (folder / INDEX).exists():
        raise BadFolder(_without_weights(folder))
    files = _files_of_index(folder / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file, names in files.items():
        if not (folder / file).exists():
            missing = sorted(name for name in files if not (folder / name).exists())
            raise BadFolder(
                f"{folder} lacks {len(missing)} of the {len(files)} files that {INDEX} lists, first {missing[0]}: "
                "download the folder again"
            )
        found = _header(folder / file)
        if absent := sorted(names - found.keys()):
            raise BadFolder(
                f"{folder / file} lacks {len(absent)} tensors that {INDEX} promises, first {absent[0]}: file and index "
                "are of different downloads; download the folder again"
            )
        tensors |= {name: found[name] for name in names}
    return tensors


def _files_of_index(path: Path) -> dict[str, set[str]]:
    """File -> the names of its tensors."""
    try:
        places: Any = json.loads(path.read_bytes())["weight_map"]
        files: dict[str, set[str]] = {}
        for name, file in places.items():
            files.setdefault(str(file), set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFolder(f"{path} is no index of tensors ({error!r}): download the folder again") from error
    return files


def _header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        front = file.read(8)
        length = struct.unpack("<Q", front)[0] if len(front) == 8 else 0
        text = file.read(length) if 0 < length <= min(_LARGEST_HEADER, size) else b""
    try:
        header: Any = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        tensors = {name: StoredTensor(str(e["dtype"]), tuple(map(int, e["shape"]))) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFolder(f"{path} is no safetensors file, or damaged ({size} bytes): download it again") from error
    if size < 8 + length + end:
        raise BadFolder(f"{path} is truncated: {size} bytes of {8 + length + end}; download it again")
    return tensors


def _without_weights(folder: Path) -> str:
    """Why a folder without the usual files can't be loaded."""
    if (folder / "adapter_config.json").exists():
        return (
            f"{folder} has adapters and not the model that they belong to: merge them with peft's `merge_and_unload`, "
            "and save the result"
        )
    others = sorted({path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern)})
    if others:
        return (
            f"{folder} has its weights as {others[0]}, only safetensors files are read: convert them with "
            "transformers' `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)`"
        )
    if strays := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder} has {strays[0]}, but neither {ONE_FILE} nor {INDEX}, which says what is in the files"
    return f"{folder} has no *.safetensors weights: its download is not complete"
