"""A torch engine on the module that is trained, so that generation and training take turns with one set of weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from protocols.weights import Version
from workers.data.vocabulary import Vocabulary
from workers.generation.engine import FinishedRow
from workers.generation.torch import TorchEngine
from workers.settings import Generation
from workers.training.offload import Offloader


class OwnEngine(TorchEngine):
    """Brings the module back to its device for a step where it was offloaded."""

    def __init__(
        self,
        module: PreTrainedModel,
        settings: Generation,
        run_seed: int,
        vocabulary: Vocabulary,
        offloader: Offloader,
        *,
        version: Version,
    ) -> None:
        super().__init__(module, settings, run_seed, vocabulary, owns_model=False, version=version)
        self._offloader = offloader

    def step(self) -> list[FinishedRow]:
        """See TorchEngine.step."""
        self._offloader.onload()
        return super().step()
