"""What a publication has to pass before an engine counts as holding it: bytes, fit, and the answer to the probe.

Every engine takes these steps in this order, whatever it does with the tensors in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocols.weights import BadWeights, Probe, TensorEntry, Version, WeightManifest, verify
from workers.training.models import DTYPES

# An IEEE number is NaN or infinite where all bits of its exponent are set; numpy has no bfloat16 to ask.
_EXPONENTS = {"float32": (np.uint32, np.uint32(0x7F800000)), "bfloat16": (np.uint16, np.uint16(0x7F80))}


def check_publication(manifest: WeightManifest, buffer: npt.NDArray[np.uint8], installed: Version | None) -> None:
    """Raise BadWeights before anything is touched: version not newer, wrong bytes, unknown dtype, NaN or infinity."""
    if installed is not None and manifest.version <= installed:
        raise BadWeights(f"version {manifest.version} is not newer than {installed}, which is installed")
    verify(manifest.tensors, buffer)
    for entry in manifest.tensors:
        if entry.dtype not in _EXPONENTS:
            raise BadWeights(f"tensor {entry.name} is {entry.dtype}; weights travel as {' or '.join(_EXPONENTS)}")
        word, exponent = _EXPONENTS[entry.dtype]
        words = np.ascontiguousarray(_bytes_of(entry, buffer)).view(word)
        if wrong := int(((words & exponent) == exponent).sum()):
            raise BadWeights(
                f"tensor {entry.name} of version {manifest.version}: {wrong} of {words.size} values not finite"
            )


def refuse_misfits(manifest: WeightManifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise BadWeights where a publication does not hold exactly the tensors of an engine, by name and shape."""
    sent = shapes_of(manifest)
    if missing := sorted(shapes.keys() - sent.keys()):
        raise BadWeights(
            f"version {manifest.version} lacks {len(missing)} of {len(shapes)} tensors, first {missing[0]}"
        )
    for name, shape in sent.items():
        if name not in shapes:
            raise BadWeights(f"version {manifest.version} holds tensor {name}, which the model does not have")
        if shape != shapes[name]:
            raise BadWeights(f"tensor {name} of version {manifest.version} is {shape}, the model's {shapes[name]}")


def shapes_of(manifest: WeightManifest) -> dict[str, tuple[int, ...]]:
    """Shape of each published tensor by name."""
    return {entry.name: tuple(entry.shape) for entry in manifest.tensors}


def read_tensors(manifest: WeightManifest, buffer: npt.NDArray[np.uint8]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, each a copy: the buffer may be memory that other readers share."""
    for entry in manifest.tensors:
        data = torch.from_numpy(np.array(_bytes_of(entry, buffer)))
        yield entry.name, data.view(DTYPES[entry.dtype]).view(entry.shape)


def verify_installed(probe: Probe | None, answer: Callable[[list[list[int]]], list[list[float]]]) -> float:
    """Largest absolute difference between the trainer's log-probs of the probe and the engine's; NaN without probe.

    Raises BadWeights where it exceeds the probe's tolerance: some tensor was not installed as it was sent.
    """
    if probe is None:
        return math.nan
    answered = np.concatenate([np.asarray(row, np.float64) for row in answer(probe.tokens)])
    expected = np.concatenate([np.asarray(row, np.float64) for row in probe.log_probs])
    difference = float(np.abs(answered - expected).max())
    if not difference <= probe.tolerance:  # so written, NaN refuses too
        raise BadWeights(
            f"probe: log-probs differ by {difference:.3g} from the trainer's, tolerance {probe.tolerance:.3g}; "
            "a tensor was not installed as sent, or the tolerance is too tight for this dtype"
        )
    return difference


def packable(tensor: Tensor) -> tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]:
    """A tensor as `protocols.weights.pack` takes it: dtype, shape, bytes."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data


def _bytes_of(entry: TensorEntry, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return buffer[entry.start : entry.start + entry.nbytes]
