"""An engine on the devices of the ranks that train: it takes turns with training, and loads what was trained last.

    publish   the current weights reach the engine, which from then on may generate
    generate  the rows of each generation replica
    release   the devices are the training's again

Every rank of the topology constructs one and calls these methods together with the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from protocols.data.messages import Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Partial
from protocols.weights import Probe, Version
from workers.resharding.hybrid_engine import Transition


class ColocatedEngine(ABC):
    """One rank's part of the engines that generate beside a model that trains."""

    def __init__(self) -> None:
        self._lineage = 0

    def publish(self, step: int, probe: Callable[[], Probe]) -> Transition | None:
        """Have the engine load the weights of `step`, the model's step; `probe` is their answer to the probe batch.

        Returns what that took; None where the engine has these weights already. Raises BadWeights.
        """
        return self._publish(Version(self._lineage, step), probe)

    @abstractmethod
    def _publish(self, version: Version, probe: Callable[[], Probe]) -> Transition | None:
        """See `publish`."""

    @property
    @abstractmethod
    def generating(self) -> bool:
        """Whether the devices are the engine's: between `publish` and `release`."""

    @abstractmethod
    def generate(self, prompts: Prompts, sampling: Sampling) -> Partial[Rollouts] | None:
        """This generation replica's rows; None on ranks whose rows are another rank's too."""

    @abstractmethod
    def release(self) -> None:
        """Leave the devices to training, until the next `publish`."""

    def restored(self) -> None:
        """The model was loaded from a checkpoint: later versions count as newer, whatever their step."""
        self._lineage += 1

    def close(self) -> None:  # noqa: B027 - an engine in the model's own process and memory has nothing to free
        """Free what the engine has beside the model."""
