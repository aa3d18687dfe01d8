"""An engine on the devices of the ranks that train: the two take turns, and the engine loads the newest weights.

    publish   load the current weights; the engine has the devices from now on
    generate  generate the rows of each generation replica
    release   give the devices back to training

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
        """Load the weights of `step`, the model's step, into the engine; `probe` gives their answer to the probe batch.

        Returns what that took; None if the engine has these weights already. Raises BadWeights.
        """
        return self._publish(Version(self._lineage, step), probe)

    @abstractmethod
    def _publish(self, version: Version, probe: Callable[[], Probe]) -> Transition | None:
        """See `publish`."""

    @property
    @abstractmethod
    def generating(self) -> bool:
        """Whether the engine has the devices: between `publish` and `release`."""

    @abstractmethod
    def generate(self, prompts: Prompts, sampling: Sampling) -> Partial[Rollouts] | None:
        """The rollouts of this generation replica; None on ranks whose rows another rank returns."""

    @abstractmethod
    def release(self) -> None:
        """Give the devices to training, until the next `publish`."""

    def restored(self) -> None:
        """Call when the model was loaded from a checkpoint: later versions count as newer, whatever their step."""
        self._lineage += 1

    def close(self) -> None:  # noqa: B027 - an engine in the model's own process and memory has nothing to free
        """Free what the engine holds besides the model."""
