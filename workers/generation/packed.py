"""The publication for another service: the weights are sent as one buffer, through the object store or a socket.

The manifest names the tensors in it, with a digest of the bytes of each. The whole proof applies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocols.weights import BadWeights, Probe, TensorEntry, Version, WeightManifest, pack, verify
from workers.generation.publication import Part, Publication
from workers.settings import Model
from workers.training.checkpoint_names import CheckpointNames
from workers.training.lora import merge, transposed_weights
from workers.training.models import DTYPES, load_causal, tensors_in_memory

# An IEEE number is NaN or infinite if all bits of its exponent are set. numpy has no bfloat16 whose isfinite to call.
_EXPONENTS = {"float32": (np.uint32, np.uint32(0x7F800000)), "bfloat16": (np.uint16, np.uint16(0x7F80))}


class PackedWeights(NamedTuple):
    """Whole canonical tensors, or low-rank adapters, in one buffer."""

    manifest: WeightManifest
    buffer: npt.NDArray[np.uint8]  # perhaps memory that other readers share: it is never written

    @classmethod
    def publish(
        cls, version: Version, tensors: Mapping[str, Tensor], probe: Probe | None, scaling: float | None = None
    ) -> PackedWeights:
        """Copy tensors that are in host memory: the next optimizer step may start when this returns."""
        entries, buffer = pack({name: _described(tensor) for name, tensor in tensors.items()})
        return cls(WeightManifest(version, entries, len(buffer), probe, scaling), buffer)

    @property
    def version(self) -> Version:
        return self.manifest.version

    @property
    def probe(self) -> Probe | None:
        return self.manifest.probe

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {entry.name: tuple(entry.shape) for entry in self.manifest.tensors}

    def verify(self) -> None:
        """Raise BadWeights for wrong bytes, an unknown dtype, NaN and infinity."""
        verify(self.manifest.tensors, self.buffer)
        for entry in self.manifest.tensors:
            if entry.dtype not in _EXPONENTS:
                raise BadWeights(f"tensor {entry.name} is {entry.dtype}; weights travel as {' or '.join(_EXPONENTS)}")
            word, exponent = _EXPONENTS[entry.dtype]
            words = np.ascontiguousarray(self._bytes_of(entry)).view(word)
            if wrong := int(((words & exponent) == exponent).sum()):
                raise BadWeights(
                    f"tensor {entry.name} of version {self.version}: {wrong} of {words.size} values not finite"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors one by one, each a copy."""
        for entry in self.manifest.tensors:
            data = torch.from_numpy(np.array(self._bytes_of(entry)))
            yield entry.name, data.view(DTYPES[entry.dtype]).view(entry.shape)

    def parts(self) -> Iterator[Part]:
        yield self.tensors()

    def _bytes_of(self, entry: TensorEntry) -> npt.NDArray[np.uint8]:
        return self.buffer[entry.start : entry.start + entry.nbytes]


class MergedAdapters:
    """Published adapters, merged into the base model of a folder: an engine installs whole tensors.

    A few per cent of the weights are sent. The digests are those of the adapters; the merged model answers the probe.
    The base is read again for each version, so that it takes no memory between two publications.
    """

    def __init__(self, adapters: PackedWeights, path: str, dtype: str) -> None:
        self._adapters, self._path, self._dtype = adapters, path, dtype
        self._merged: dict[str, Tensor] = {}
        self.version, self.probe = adapters.version, adapters.probe

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._merged.items()}

    @torch.no_grad()
    def verify(self) -> None:
        """Verify the adapters, and merge them. Raises BadWeights also for adapters that don't fit the base."""
        self._adapters.verify()
        base, scaling = load_causal(self._path, self._dtype), self._adapters.manifest.scaling or 0.0
        adapters = dict(self._adapters.tensors())
        try:
            merged = merge(tensors_in_memory(base), adapters, scaling, transposed_weights(base))
        except ValueError as error:
            raise BadWeights(f"version {self.version}: {error}") from error
        self._merged = CheckpointNames(base).to_checkpoint(merged)
        for name, tensor in self._merged.items():
            if not tensor.isfinite().all():
                raise BadWeights(f"tensor {name} of version {self.version}: values not finite once merged")

    def parts(self) -> Iterator[Part]:
        yield self._merged.items()


def received(manifest: WeightManifest, buffer: npt.NDArray[np.uint8], model: Model) -> Publication:
    """The publication in a received buffer, for an engine of `model`; adapters are merged into the model's folder."""
    packed = PackedWeights(manifest, buffer)
    return packed if manifest.scaling is None else MergedAdapters(packed, model.path, model.dtype)


def _described(tensor: Tensor) -> tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]:
    """A tensor as `protocols.weights.pack` takes it: dtype, shape, bytes."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data
