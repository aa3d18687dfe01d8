"""An engine that is sent adapters and serves the merged model: a publication is a few per cent of the weights.

The base stands in the policy's folder, where the engine's own shape came from. The engine inside sees a publication of
whole canonical tensors, and proves it by the same probe: nothing of it knows of adapters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocols.data.messages import Prompts
from protocols.roles import Sampling
from protocols.weights import BadWeights, InstallReceipt, Version, WeightManifest, pack
from workers.generation.engine import Engine, FinishedRow
from workers.generation.publication import check_publication, packable, read_tensors
from workers.training.lora import merge
from workers.training.models import canonical_tensors, load_causal


class MergingEngine(Engine):
    """Merges what is published into the base of a folder, and hands the whole to an engine that it owns."""

    def __init__(self, engine: Engine, path: str, dtype: str) -> None:
        self._engine = engine
        self._path, self._dtype = path, dtype

    @property
    def version(self) -> Version | None:
        return self._engine.version

    @property
    def unfinished(self) -> int:
        return self._engine.unfinished

    def submit(self, prompts: Prompts, sampling: Sampling, retry: int = 0) -> None:
        self._engine.submit(prompts, sampling, retry)

    def step(self) -> list[FinishedRow]:
        return self._engine.step()

    def load(self, manifest: WeightManifest, buffer: npt.NDArray[np.uint8]) -> InstallReceipt:
        """As every engine's; BadWeights also for adapters that don't fit the base."""
        if manifest.scaling is not None:
            check_publication(manifest, buffer, self.version)
            manifest, buffer = self._whole(manifest, dict(read_tensors(manifest, buffer)), manifest.scaling)
        return self._engine.load(manifest, buffer)

    def statistics(self) -> dict[str, float]:
        return self._engine.statistics()

    def close(self) -> None:
        self._engine.close()

    @torch.no_grad()
    def _whole(
        self, manifest: WeightManifest, adapters: dict[str, Tensor], scaling: float
    ) -> tuple[WeightManifest, npt.NDArray[np.uint8]]:
        try:
            # Read each time: between two publications the base takes no memory.
            merged = merge(canonical_tensors(load_causal(self._path, self._dtype)), adapters, scaling)
        except ValueError as error:
            raise BadWeights(f"version {manifest.version}: {error}") from error
        entries, whole = pack({name: packable(tensor) for name, tensor in merged.items()})
        return WeightManifest(manifest.version, entries, len(whole), manifest.probe), whole
