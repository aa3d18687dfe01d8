"""Offloading: a model's tensors move to host memory while others use its device, and return before it computes.

Each tensor keeps its identity and changes only its storage, so modules and optimizer do not notice. On a CPU nothing
moves, because the device's memory is the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HOST = torch.device("cpu")

Copy = Callable[[Tensor], Tensor]  # the same values in another storage
Relocate = Callable[[Copy], int]  # replaces the storage of all tensors that a model keeps; returns their bytes


def relocated(tensors: Iterable[Tensor], copy: Copy) -> int:
    """Give each tensor the storage that `copy` makes of it; the bytes of all."""
    moved = 0
    for tensor in tensors:
        tensor.data = copy(tensor.data)
        moved += tensor.nbytes
    return moved


class Offloader:
    """Moves a model off its device and back by `relocate`, and knows where it is."""

    def __init__(self, device: torch.device, relocate: Relocate) -> None:
        self._device, self._relocate = device, relocate
        self.moves = device.type != HOST.type
        self._away = False

    def offload(self) -> int:
        """Move all to the host, and free the device's memory; returns the bytes that moved."""
        if not self.moves or self._away:
            return 0
        moved = self._relocate(lambda tensor: tensor.to(HOST))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # or another process could not have what is free
        self._away = True
        return moved

    def onload(self) -> int:
        """Move all to the device; returns the bytes that moved, 0 where it is there already."""
        if not self._away:
            return 0
        moved = self._relocate(lambda tensor: tensor.to(self._device))
        self._away = False
        return moved
