"""A worker as it stands in its process: with its engine, its ranks, and the way its model leaves the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from protocols.control.replies import Done
from workers.generation.engine import Engine

if TYPE_CHECKING:
    from workers.parallel.process_group import World
    from workers.training.offload import Offloader


class LoadedWorker(msgspec.Struct):
    """A worker, and the engine where its service generates."""

    worker: Any
    engine: Engine | None = None
    load_trained: Callable[[], None] | None = None  # for an engine that shares the trained model: its newest version
    world: World | None = None  # the other ranks, where they work together

    @property
    def offloader(self) -> Offloader | None:
        """Moves the worker's model off its device; None where it has no model."""
        return getattr(self.worker, "offloader", None)

    def method(self, name: str) -> Callable[..., Any]:
        """A stage method of the worker. Raises AttributeError."""
        return getattr(self.worker, name)

    def onload(self) -> None:
        """Have the model on its device, for work."""
        if self.offloader is not None:
            self.offloader.onload()

    def offload(self) -> Done:
        """Free the device's memory, where the model can leave it."""
        moves = self.offloader is not None and self.offloader.moves
        return Done({"moves": float(moves), "bytes": float(self.offloader.offload() if self.offloader else 0)})

    def close(self) -> None:
        """Free what the worker and the engine hold."""
        if self.engine is not None:
            self.engine.close()
        if close := getattr(self.worker, "close", None):
            close()
        if self.world is not None:
            self.world.leave()
