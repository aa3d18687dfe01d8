"""The publication for an engine that runs the very tensors that were trained: nothing is copied to it.

Either the engine shares the trained module, in one process, or the training ranks have gathered their shards into the
module that generates (`HybridEngine.to_generation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from protocols.weights import Version
from workers.generation.engine import Engine
from workers.generation.publication import Part


class InPlaceWeights(NamedTuple):
    """A version whose tensors are in the engine's module already.

    No bytes travel, so there are no digests. The module that answers is the one that was trained, so a probe would
    compare it with itself. The engine drops its caches as for any version.
    """

    version: Version
    probe = None
    shapes = None

    def verify(self) -> None:
        """Nothing to verify: see the class."""

    def parts(self) -> Iterator[Part]:
        return iter(())


def load_in_place(engine: Engine, version: Version) -> None:
    """Load the version that the engine's module holds now, where the engine does not have it yet."""
    if engine.version is None or version > engine.version:
        engine.load(InPlaceWeights(version))
