"""Leaving a device to others: what a model holds on it goes to host memory, and comes back before it works again.

Each tensor keeps its identity and changes its storage only, so modules and optimizer need not know. On a CPU nothing
moves: the device's memory is the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HOST = torch.device("cpu")

Copy = Callable[[Tensor, torch.device], Tensor]  # the same values on a device


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


class Residence:
    """Where a model's tensors are. `tensors` lists them anew each time: an optimizer gets its moments as it steps."""

    def __init__(
        self,
        device: torch.device,
        tensors: Callable[[], Iterable[Tensor]],
        *,
        moves: bool | None = None,
        copy: Copy = _to,
    ) -> None:
        """`moves`: whether anything does; by default where the device is not the host."""
        self._device, self._tensors, self._copy = device, tensors, copy
        self.moves = device.type != HOST.type if moves is None else moves
        self._away = False

    def leave(self) -> int:
        """Move all to the host, and free the device's memory; returns the bytes that moved."""
        if not self.moves or self._away:
            return 0
        moved = self._move(HOST)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # or another process could not have what is free
        self._away = True
        return moved

    def come_back(self) -> int:
        """Move all to the device; returns the bytes that moved, 0 where it is there already."""
        if not self._away:
            return 0
        moved = self._move(self._device)
        self._away = False
        return moved

    def _move(self, device: torch.device) -> int:
        moved = 0
        for tensor in self._tensors():
            tensor.data = self._copy(tensor.data, device)
            moved += tensor.nbytes
        return moved
