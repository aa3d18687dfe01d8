"""Weight manifests: received tensors are verified against those that were sent."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.weights import BadWeights, Probe, Version, WeightManifest, digest, pack, verify

Tensors = dict[str, tuple[str, tuple[int, ...], np.ndarray]]

names = st.text("abc.", min_size=1, max_size=4)
blobs = st.binary(max_size=150).map(lambda blob: ("float32", (len(blob),), np.frombuffer(blob, np.uint8)))
tensors = st.dictionaries(names, blobs, max_size=5)


def two_tensors() -> Tensors:
    return {
        "embed": ("bfloat16", (5, 2), np.arange(20, dtype=np.uint8)),
        "head": ("float32", (2,), np.arange(8, dtype=np.uint8)),
    }


@given(tensors)
def test_what_is_packed_is_verified(sent: Tensors):
    entries, buffer = pack(sent)
    verify(entries, buffer)
    assert [entry.name for entry in entries] == list(sent)
    for entry, (dtype, shape, data) in zip(entries, sent.values(), strict=True):
        assert (entry.dtype, entry.shape) == (dtype, shape)
        assert entry.start % 64 == 0
        assert buffer[entry.start : entry.start + entry.nbytes].tobytes() == data.tobytes()


def test_tensors_do_not_overlap_and_end_with_the_buffer():
    entries, buffer = pack(two_tensors())
    assert [(entry.start, entry.nbytes) for entry in entries] == [(0, 20), (64, 8)]
    assert len(buffer) == 72


def test_every_changed_byte_names_its_tensor():
    entries, buffer = pack(two_tensors())
    for entry in entries:
        for position in range(entry.start, entry.start + entry.nbytes):
            damaged = buffer.copy()
            damaged[position] ^= 1
            with pytest.raises(BadWeights, match=f"tensor {entry.name}:"):
                verify(entries, damaged)


def test_a_short_buffer_is_refused():
    entries, buffer = pack(two_tensors())
    with pytest.raises(BadWeights, match="tensor head: the 4 bytes received are not the 8 bytes sent"):
        verify(entries, buffer[:68])


def test_swapped_tensors_are_refused():
    entries, buffer = pack(two_tensors() | {"embed": ("float32", (2,), np.ones(8, np.uint8))})
    with pytest.raises(BadWeights, match="tensor embed"):
        verify(entries, np.concatenate([buffer[64:72], buffer[8:64], buffer[:8]]))


def test_a_digest_is_of_bytes_not_of_type_or_layout():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest(values) == digest(np.frombuffer(values.tobytes(), np.uint8))
    assert digest(values.T) == digest(np.ascontiguousarray(values.T))
    assert digest(values.T) != digest(values)
    assert len(digest(values)) == 32


def test_versions_are_ordered_by_term_then_step():
    assert sorted([Version(1, 0), Version(0, 9), Version(1, 2)]) == [Version(0, 9), Version(1, 0), Version(1, 2)]
    assert str(Version(1, 12)) == "1.12"


def test_a_manifest_travels_as_msgpack():
    entries, buffer = pack(two_tensors())
    manifest = WeightManifest(Version(0, 3), entries, len(buffer), Probe([[1, 2]], [[-0.5]], tolerance=1e-3))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=WeightManifest) == manifest
