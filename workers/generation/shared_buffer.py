"""Memory that one process writes and others on its machine read: a file that all map, or a buffer of a CUDA device.

Writer and readers must agree otherwise on when it may be read, and when it may be written again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from workers.parallel.decoder import unflat
from workers.parallel.plan import Parameter
from workers.training.models import DTYPES

_MEMORY = Path("/dev/shm")  # else the folder for temporary files: slower, and as correct


class NoRoom(Exception):
    """No file system of this machine has room for a shared buffer. The message says how much there is."""


class BufferHandle(msgspec.Struct, frozen=True):
    """How another process opens the memory. It must see the CUDA device under the number in the handle."""

    size: int  # bytes
    path: str = ""  # of the file; "" for a CUDA buffer
    ipc_handle: tuple[int | bytes | bool, ...] = ()  # CUDA's for the buffer, as torch shares storages

    def on_device(self, number: int) -> BufferHandle:
        """The same memory for a process that sees its CUDA device under another number than the writer does."""
        return msgspec.structs.replace(self, ipc_handle=(number, *self.ipc_handle[1:])) if self.ipc_handle else self

    def open(self) -> Tensor:
        """The memory, uint8 [size]. A process opens each buffer once and keeps it open."""
        return _opened(self)


class SharedBuffer:
    """The writer's side: `memory`, and the `handle` to give to the readers."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Raises NoRoom."""
        self._file: tempfile._TemporaryFileWrapper | None = None
        if device.type == "cuda":
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
            self.handle = BufferHandle(size, ipc_handle=tuple(self.memory.untyped_storage()._share_cuda_()))
            return
        self._file = _reserved(size, [_MEMORY, Path(tempfile.gettempdir())])
        self.handle = BufferHandle(size, path=self._file.name)
        self.memory = _mapped(self._file.name, size)

    def close(self) -> None:
        """Free the memory once its readers have closed it."""
        if self._file is not None:
            self._file.close()


class SharedTensor(msgspec.Struct, frozen=True):
    """The places of one tensor's shards in the buffers of the ranks that generate together."""

    spec: Parameter
    dtype: str
    start: int  # bytes, in every buffer
    stop: int

    def join(self, buffers: list[BufferHandle], device: torch.device | None) -> Tensor:
        """The tensor at full size, a copy on a device."""
        sharded = buffers if self.spec.cut is not None else buffers[:1]
        shards = (buffer.open()[self.start : self.stop].view(DTYPES[self.dtype]) for buffer in sharded)
        return unflat(torch.cat([shard.to(device) for shard in shards]), self.spec, self.spec.shape)


class SharedTensors(msgspec.Struct, frozen=True):
    """Tensors whose shards lie in shared buffers."""

    tensors: list[SharedTensor]
    buffers: list[BufferHandle]  # in the order of tensor indices

    def on_device(self, device: torch.device | None) -> Iterator[tuple[str, Tensor]]:
        """The tensors by name, each at full size while it is used."""
        return ((tensor.spec.name, tensor.join(self.buffers, device)) for tensor in self.tensors)


def _reserved(size: int, folders: list[Path]) -> tempfile._TemporaryFileWrapper:
    """A file of that size in the first of the folders that has room for it. Raises NoRoom.

    Its name is removed when it is closed or collected; processes that have mapped it keep the memory.
    """
    refused: list[str] = []
    for folder in folders:
        try:
            file = tempfile.NamedTemporaryFile(dir=folder, prefix="weights-")  # noqa: SIM115
            # Its pages are taken now: a page that is missing when it is written would kill the process by SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            free = f", {shutil.disk_usage(folder).free / 1e6:.1f} MB free" if folder.is_dir() else ""
            refused.append(f"{folder}: {error.strerror}{free}")
        else:
            return file
    raise NoRoom(
        f"a shared buffer of {size / 1e6:.1f} MB finds no room: {'; '.join(refused)}; enlarge /dev/shm "
        f"(docker run --shm-size), or set TMPDIR to a folder with room"
    )


@cache
def _opened(handle: BufferHandle) -> Tensor:
    if handle.path:
        return _mapped(handle.path, handle.size)
    storage = torch.UntypedStorage._new_shared_cuda(*handle.ipc_handle)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, torch.Size([handle.size]), (1,))


def _mapped(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
