"""The checkpoint of a trained model: any topology and backend writes it, and any other reads its own part.

    trainer.json         version, optimizer steps, random state
    *.safetensors        weights by checkpoint name, AdamW's moments under a prefix; each tensor in boxes, whose offsets
                         are in the file's header, or whole

This is the Hugging Face storage format of torch.distributed.checkpoint (DCP), which writes boxes, reads parts of them,
and finds those that cover a wanted box. DCP's own save and load are not used: their ranks agree by pickled messages,
and a load does not notice a missing file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTERS, _OLDER = "trainer.json", "shards.json"


class Counters(msgspec.Struct, frozen=True):
    """The part of a checkpoint that is not tensors."""

    version: int
    updates: int  # optimizer steps taken
    torch_rng: str  # hexadecimal; rank 0's, for all: replicas must not draw apart
    lora_scaling: float | None = None  # of the adapters, where only they are trained

    @classmethod
    def now(cls, version: int, updates: int, lora_scaling: float | None = None) -> Counters:
        """With this process's random state."""
        return cls(version, updates, torch.get_rng_state().numpy().tobytes().hex(), lora_scaling)

    def restore_rng(self) -> None:
        """Give this process the random state."""
        torch.set_rng_state(torch.from_numpy(np.frombuffer(bytes.fromhex(self.torch_rng), np.uint8).copy()))

    def write(self, folder: str | Path) -> None:
        """Write them into a checkpoint's folder."""
        (Path(folder) / _COUNTERS).write_bytes(msgspec.json.encode(self))


class Box(NamedTuple):
    """A part of a tensor, and where it begins in the whole."""

    values: Tensor
    start: tuple[int, ...]
    whole: tuple[int, ...]

    @classmethod
    def all_of(cls, tensor: Tensor) -> Box:
        """The whole tensor."""
        return cls(tensor, (0,) * tensor.dim(), tuple(tensor.shape))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box in DCP's terms."""
        return ChunkStorageMetadata(offsets=torch.Size(self.start), sizes=self.values.shape)


def write_boxes(folder: str | Path, writer: int, boxes: Mapping[str, Box]) -> None:
    """Write the file of writer number `writer`. No two writers may write the same box."""
    items = [
        WriteItem(
            MetadataIndex(name, box.start),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(box.chunk, TensorProperties(dtype=box.values.dtype), torch.Size(box.whole)),
        )
        for name, box in boxes.items()
    ]
    storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    storage.write_data(SavePlan(items, storage_data={"shard_index": writer}), _Write(boxes)).wait()


class Saved:
    """A checkpoint to read. Raises ValueError, naming the file, if one can't be read."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self.counters = _read_counters(self._folder)
        for path in sorted(self._folder.glob("[!.]*.safetensors")):
            try:
                with safe_open(path, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: this part of the checkpoint can't be read: {error}") from error
        self._storage = HuggingFaceStorageReader(str(folder))
        visible = _WithoutHidden()
        visible.init_path(str(folder))
        self._storage.fs = visible  # pyright: ignore[reportAttributeAccessIssue] - torch annotates its parent's class
        metadata = self._storage.read_metadata()
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = metadata.state_dict_metadata

    def refuse_other(self, names: Collection[str]) -> None:
        """Raise ValueError if the names of its weights are not these."""
        beside = tuple(f"{part}." for part in MOMENTS)
        held = {name for name in self._tensors if not name.startswith(beside)}
        if odd := sorted(held ^ set(names)):
            raise ValueError(f"{self._folder}: tensors differ from the model's: {odd[:5]}")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, boxes: Mapping[str, Box]) -> None:
        """Fill the values of boxes. Raises ValueError if a tensor has another shape or is incomplete."""
        items = [item for name, box in boxes.items() for item in self._items(name, box)]
        self._storage.read_data(LoadPlan(items), _Read(boxes)).wait()

    def _items(self, name: str, box: Box) -> list[ReadItem]:
        stored = self._tensors.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{self._folder}: {name} is not there")
        items = create_read_items_for_chunk_list(name, stored, [box.chunk])
        there = sum(math.prod(item.lengths) for item in items)
        if stored.size != box.whole or there != box.values.numel():
            raise ValueError(
                f"{self._folder}: {name} has shape {list(stored.size)}, with {there} of the {box.values.numel()} "
                f"entries that are wanted; the model's is {list(box.whole)}: another model's, or a file is missing"
            )
        return items


class _WithoutHidden(FileSystem):
    """Hidden files are another program's, as ._0.safetensors that macOS puts beside 0.safetensors."""

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [name for name in super().ls(path) if not Path(name).name.startswith(".")]


class _Write(DefaultSavePlanner):
    """Where DCP finds the values that it writes."""

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__()
        self._boxes = boxes

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index.fqn].values.contiguous()


class _Read(DefaultLoadPlanner):
    """Where DCP puts the values that it reads."""

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__()
        self._boxes = boxes

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index.fqn].values


def _read_counters(folder: Path) -> Counters:
    path = folder / _COUNTERS
    if (folder / _OLDER).exists():
        raise ValueError(f"{folder}: {_OLDER} is of an older version, whose shards are not read any more")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Counters)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no checkpoint of a trained model: {error}") from error
