"""How weights are published: canonical tensors with the digests of their bytes, and a probe batch with its answer.

Canonical means the names and layout of the model's transformers checkpoint. A receiver verifies every digest, which
proves the transport, and then answers the probe batch, which proves the installation: engines change the layout of the
tensors, so their bytes can't be compared, and some loaders silently ignore a tensor. Low-rank adapters may be sent in
place of the tensors that they change; the probe proves the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.version import Version


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor inside the flat buffer."""

    name: str
    dtype: str  # torch's name without the prefix: "float32", "bfloat16"
    shape: tuple[int, ...]
    start: int  # byte offset, 64-byte aligned
    nbytes: int
    digest: str  # blake2b-128 of the bytes


class Probe(msgspec.Struct, frozen=True):
    """A fixed batch of tokens, and the trainer's log-probs of them: an engine that gives the same has the weights."""

    tokens: list[list[int]]
    log_probs: list[list[float]]  # of tokens[i][1:], under the trainer's weights
    tolerance: float  # the largest root mean square difference, nats, that still proves the installation


class WeightManifest(msgspec.Struct, frozen=True):
    """The contents of one publication."""

    version: Version
    tensors: list[TensorEntry]
    total_bytes: int
    probe: Probe | None = None
    scaling: float | None = None  # of adapters: the receiver adds scaling B A to its base; None: whole tensors


class BadWeights(Exception):
    """A publication was not installed; the message names the tensor or the probe's difference."""


_ALIGNMENT = 64


def pack(
    tensors: Mapping[str, tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]],
) -> tuple[list[TensorEntry], npt.NDArray[np.uint8]]:
    """Copy tensors, given as (dtype, shape, bytes), into one buffer; the entries hold their places and digests."""
    entries: list[TensorEntry] = []
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        entries.append(TensorEntry(name, dtype, shape, start, data.nbytes, digest(data)))
        end = start + data.nbytes
    buffer = np.zeros(end, dtype=np.uint8)
    for entry, (_, _, data) in zip(entries, tensors.values(), strict=True):
        buffer[entry.start : entry.start + entry.nbytes] = data
    return entries, buffer


def digest(data: npt.NDArray[Any]) -> str:
    """The digest of a tensor's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(data).view(np.uint8).data, digest_size=16).hexdigest()


def verify(entries: Iterable[TensorEntry], buffer: npt.NDArray[np.uint8]) -> None:
    """Verify that a buffer has the bytes that were sent. Raises BadWeights naming the tensor."""
    for entry in entries:
        data = buffer[entry.start : entry.start + entry.nbytes]
        if data.nbytes != entry.nbytes or digest(data) != entry.digest:
            raise BadWeights(
                f"tensor {entry.name}: the {data.nbytes} bytes received are not the {entry.nbytes} bytes sent"
            )
