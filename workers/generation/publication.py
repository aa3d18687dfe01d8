"""One interface for "install version v on an engine": a trainer publishes, an engine loads, over any transport.

    transport      publish, on the trainer's side              what `Engine.load` is given
    packed buffer  PackedWeights.publish: a copy to send       PackedWeights or MergedAdapters (packed.py)
    shared memory  WeightTransfer.publish: generation shards,  StreamedWeights (weight_transfer.py)
    or CUDA IPC    module by module as they are gathered
    all-gather     HybridEngine.to_generation: into the        InPlaceWeights (in_place.py)
                   module that the engine runs
    shared module  nothing: the engine runs what is trained    InPlaceWeights

`Engine.load` is written once. It verifies every version in the same way: the digests of the bytes, an emptied prefix
cache, the engine's answer to a probe batch. Each publication says in its docstring which part can't apply to it.
A further transport, such as an NCCL broadcast to several replicas, is one more file with a `Publication` in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from protocols.weights import BadWeights, Probe, Version

if TYPE_CHECKING:  # modules that only name an engine do without torch
    from torch import Tensor

    from workers.generation.shared_buffer import SharedTensors

# Canonical tensors by name, in this process or in memory that processes share.
Part: TypeAlias = "Iterable[tuple[str, Tensor]] | SharedTensors"
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class Publication(Protocol):
    """The weights of one version on their way to an engine."""

    @property
    def version(self) -> Version: ...

    @property
    def probe(self) -> Probe | None:
        """The probe batch and the trainer's answer to it; None installs without this part of the proof."""
        ...

    @property
    def shapes(self) -> Shapes | None:
        """Shape of each tensor by name; None where both sides fix the tensors beforehand."""
        ...

    def verify(self) -> None:
        """Raise BadWeights where bytes are not those that were sent, or not finite. Nothing is installed yet."""
        ...

    def parts(self) -> Iterator[Part]:
        """The tensors, in parts that hold whole modules. A part may be overwritten when the next one is asked for."""
        ...


def verify_newer(version: Version, newest: Version | None) -> None:
    """Raise BadWeights where a version is not newer than the newest one that was installed."""
    if newest is not None and version <= newest:
        raise BadWeights(f"version {version} is not newer than {newest}, which is installed")


def verify_shapes(version: Version, published: Shapes, own: Shapes) -> None:
    """Raise BadWeights where a publication does not hold exactly the tensors of an engine, by name and shape."""
    if missing := sorted(own.keys() - published.keys()):
        raise BadWeights(f"version {version} lacks {len(missing)} of {len(own)} tensors, first {missing[0]}")
    for name, shape in published.items():
        if name not in own:
            raise BadWeights(f"version {version} holds tensor {name}, which the model does not have")
        if shape != own[name]:
            raise BadWeights(f"tensor {name} of version {version} is {shape}, the model's {own[name]}")


def verify_installed(probe: Probe | None, answer: Callable[[list[list[int]]], list[list[float]]]) -> float:
    """Root mean square difference of the trainer's log-probs of the probe and the engine's, nats; NaN without probe.

    A mean over tokens, because one token's difference says little: in bfloat16 the largest of 252 is several times the
    mean, and varies from one engine to the next. Raises BadWeights where it exceeds the probe's tolerance: some tensor
    was not installed as it was sent. A fault that changes log-probs less than rounding does is not found, such as a key
    bias of one layer of 24 in bfloat16; in float32 nearly all are.
    """
    if probe is None:
        return math.nan
    answered = np.concatenate([np.asarray(row, np.float64) for row in answer(probe.tokens)])
    expected = np.concatenate([np.asarray(row, np.float64) for row in probe.log_probs])
    difference = float(np.sqrt(np.square(answered - expected).mean()))
    if not difference <= probe.tolerance:  # so written, NaN refuses too
        raise BadWeights(
            f"probe: log-probs differ by {difference:.3g} nats (root mean square) from the trainer's, tolerance "
            f"{probe.tolerance:.3g}: a tensor was not installed as it was sent. If the engine computes this model in "
            "another way on purpose (quantized, say), set generation.probe_tolerance to what it may differ by"
        )
    return difference
