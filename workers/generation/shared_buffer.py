"""Memory that one process writes and others on its machine read: a file that all map, or a buffer of a CUDA device.

The writer and the readers agree by other means on when it may be read, and when written again.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import msgspec
import torch
from torch import Tensor

_MEMORY = Path("/dev/shm")  # else the folder for temporary files: slower, and as right


class BufferHandle(msgspec.Struct, frozen=True):
    """How another process opens the memory. It must see the CUDA device, under the number that the window says."""

    size: int  # bytes
    path: str = ""  # of the file; "" for a CUDA buffer
    handle: tuple[int | bytes | bool, ...] = ()  # CUDA's for the buffer, as torch shares storages between processes

    def on_device(self, number: int) -> BufferHandle:
        """The same memory for a process that sees its CUDA device under another number than the writer does."""
        return msgspec.structs.replace(self, handle=(number, *self.handle[1:])) if self.handle else self

    def open(self) -> Tensor:
        """The memory, uint8 [size]. A process opens a window once and keeps it."""
        return _opened(self)


class SharedBuffer:
    """The writer's side: `memory`, and the `window` to tell the readers."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._file: tempfile._TemporaryFileWrapper | None = None
        if device.type == "cuda":
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
            self.window = BufferHandle(size, handle=tuple(self.memory.untyped_storage()._share_cuda_()))
            return
        # Its name goes when this object is closed or collected; who has mapped it keeps the memory.
        self._file = tempfile.NamedTemporaryFile(dir=_MEMORY if _MEMORY.is_dir() else None, prefix="weights-")  # noqa: SIM115
        self._file.truncate(size)
        self.window = BufferHandle(size, path=self._file.name)
        self.memory = _mapped(self._file.name, size)

    def close(self) -> None:
        """Let the memory go once its readers have."""
        if self._file is not None:
            self._file.close()


@cache
def _opened(window: BufferHandle) -> Tensor:
    if window.path:
        return _mapped(window.path, window.size)
    storage = torch.UntypedStorage._new_shared_cuda(*window.handle)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, torch.Size([window.size]), (1,))


def _mapped(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
