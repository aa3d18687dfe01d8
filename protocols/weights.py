"""Weights travel as canonical tensors: names, shapes and digests of exactly the bytes that are sent.

Canonical means the names and layout of the model's transformers checkpoint. A receiver checks every
digest (transport), then proves installation with the log-probs of a probe batch: a layout that an
engine repacks can't be hashed, and some loaders ignore a tensor without a word. Low-rank adapters may travel in the
place of the tensors that they change; what the probe proves is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt


class Version(msgspec.Struct, frozen=True, order=True):
    """Weights after `step` committed steps of lineage `term`, ordered by (term, step)."""

    term: int
    step: int

    def __str__(self) -> str:
        return f"{self.term}.{self.step}"


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor inside the flat buffer."""

    name: str
    dtype: str  # torch's name without the prefix: "float32", "bfloat16"
    shape: tuple[int, ...]
    start: int  # byte offset, 64-byte aligned
    nbytes: int
    digest: str  # blake2b-128 of the bytes


class Probe(msgspec.Struct, frozen=True):
    """A fixed batch whose log-probs prove that weights are installed: the trainer's own answer travels along."""

    tokens: list[list[int]]
    log_probs: list[list[float]]  # of tokens[i][1:], in the trainer's weights
    tolerance: float  # largest absolute difference that still proves installation


class WeightManifest(msgspec.Struct, frozen=True):
    """What one publication holds."""

    version: Version
    tensors: list[TensorEntry]
    total_bytes: int
    probe: Probe | None = None
    scaling: float | None = None  # of adapters, whose receiver adds scaling B A to its base; None: whole tensors


class InstallReceipt(msgspec.Struct, frozen=True):
    """A receiver's proof: it holds these digests and answers the probe like the trainer."""

    version: Version
    tensors: int
    probe_difference: float  # largest absolute log-prob difference over the probe
    seconds: float


class BadWeights(Exception):
    """A publication that was not installed: says which tensor or probe, and by how much."""


_ALIGNMENT = 64


def pack(
    tensors: Mapping[str, tuple[str, tuple[int, ...], npt.NDArray[np.uint8]]],
) -> tuple[list[TensorEntry], npt.NDArray[np.uint8]]:
    """Lay tensors, given as (dtype, shape, bytes), into one buffer; the entries carry their digests."""
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
    """Refuse a buffer whose bytes are not those that were sent. Raises BadWeights naming the tensor."""
    for entry in entries:
        data = buffer[entry.start : entry.start + entry.nbytes]
        if data.nbytes != entry.nbytes or digest(data) != entry.digest:
            raise BadWeights(
                f"tensor {entry.name}: the {data.nbytes} bytes received are not the {entry.nbytes} bytes sent"
            )
