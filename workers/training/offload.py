"""Leaving a device to others: what a model holds on it goes to host memory, and comes back before it works again.

Each tensor keeps its identity and changes its storage only, so modules and optimizer need not know. On a CPU nothing
moves: the device's memory is the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HOST = torch.device("cpu")

Copy = Callable[[Tensor], Tensor]  # the same values in another storage
Relocate = Callable[[Copy], int]  # give all that a model holds between two calls the storage of such a copy; its bytes


def relocated(tensors: Iterable[Tensor], copy: Copy) -> int:
    """Give each tensor the storage that `copy` makes of it; the bytes of all."""
    moved = 0
    for tensor in tensors:
        tensor.data = copy(tensor.data)
        moved += tensor.nbytes
    return moved


class Offloader:
    """Where a model is, which `relocate` moves."""

    def __init__(self, device: torch.device, relocate: Relocate) -> None:
        self._device, self._relocate = device, relocate
        self.moves = device.type != HOST.type
        self._away = False

    def leave(self) -> int:
        """Move all to the host, and free the device's memory; returns the bytes that moved."""
        if not self.moves or self._away:
            return 0
        moved = self._relocate(lambda tensor: tensor.to(HOST))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # or another process could not have what is free
        self._away = True
        return moved

    def reload(self) -> int:
        """Move all to the device; returns the bytes that moved, 0 where it is there already."""
        if not self._away:
            return 0
        moved = self._relocate(lambda tensor: tensor.to(self._device))
        self._away = False
        return moved
