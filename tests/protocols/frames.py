"""Frames by hand, from the documented layout alone: what the codec's are held against, and lies for it to refuse."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from protocols.data import codec
from protocols.data.columns import Array, Batch, Jagged, columns_of

Cuts = Sequence[int]  # the first row of each block, and N


def sample(kind: type[Batch]) -> Batch:
    """Two rows, of three values and of none: small, and the same for ever."""
    columns: dict[str, Any] = {}
    for number, spec in enumerate(columns_of(kind)):
        values = np.arange(number, number + 3).astype(spec.dtype)
        if spec.name == "references":
            columns[spec.name] = Jagged.from_texts(["42", "π"])
        elif spec.name in ("loss_mask", "finishes"):
            flags = np.array([0, 1, 1], np.uint8)
            columns[spec.name] = Jagged.from_lengths(flags, [3, 0]) if spec.jagged else flags[:2]
        else:
            columns[spec.name] = Jagged.from_lengths(values, [3, 0]) if spec.jagged else values[:2]
    return kind(**columns)


def framed(header: object, arrays: bytes = b"") -> bytes:
    """Any header, under an intact checksum, and any bytes after it."""
    packed = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    prologue = struct.pack("<4sIQ", b"AFLO", 2, len(packed))
    padded = packed + bytes(-(20 + len(packed)) % 64)
    return prologue + struct.pack("<I", zlib.crc32(prologue + padded)) + padded + arrays


def by_hand(message: Batch, cuts: Cuts, lengths: Mapping[str, Array] | None = None, **changes: object) -> bytes:
    """A message's frame, with other `lengths` of the rows of a column, and `changes` of its header."""
    arrays, pieces = _arrays(message, cuts, lengths or {})
    table = b""
    for block, (first, stop) in enumerate(pairwise(cuts)):
        checksum = zlib.crc32(b"".join(arrays[start:end] for start, end in pieces[block]))
        values = (column.offsets[stop] - column.offsets[first] for column in _jagged(message))
        table += struct.pack(f"<{2 + len(_jagged(message))}I", stop - first, *values, checksum)
    header = {
        "schema": message.schema_id,
        "version": message.schema_version,
        "term": 0,
        "attempt": 0,
        "rows": len(message),
        "columns": [{"name": c.name, "dtype": c.dtype, "jagged": c.jagged} for c in columns_of(type(message))],
        "blocks": table,
    }
    return framed(header | changes, arrays)


def owners(message: Batch, cuts: Cuts, nbytes: int) -> Array:
    """The block whose checksum each byte of the message's frame is under, -1 for the header's."""
    arrays, pieces = _arrays(message, cuts, {})
    owner = np.full(nbytes, -1)
    for block, places in enumerate(pieces):
        for start, end in places:
            owner[nbytes - len(arrays) :][start:end] = block
    return owner


def cuts_of(frame: Array) -> list[int]:
    """Where a frame's header says that its blocks begin, and N."""
    header = codec.read_header(frame)
    table = np.frombuffer(header.blocks, "<u4").reshape(-1, 2 + sum(column.jagged for column in header.columns))
    return [0, *np.cumsum(table[:, 0]).tolist()]


def refusal(frame: Any, **options: Any) -> str:
    """The reason for which a frame is refused."""
    with pytest.raises(codec.BadFrame) as caught:
        codec.decode(frame, **options)
    assert caught.value.reason == str(caught.value)
    return caught.value.reason


def _jagged(message: Batch) -> list[Jagged]:
    return [getattr(message, spec.name) for spec in columns_of(type(message)) if spec.jagged]


def _arrays(message: Batch, cuts: Cuts, lengths: Mapping[str, Array]) -> tuple[bytes, list[list[tuple[int, int]]]]:
    """The bytes after the header, and from where to where the pieces of each block reach in them."""
    arrays: list[tuple[Array, list[int]]] = []
    for spec in columns_of(type(message)):
        column = getattr(message, spec.name)
        if spec.jagged:
            arrays.append((np.asarray(lengths.get(spec.name, column.lengths), "<u4"), list(cuts)))
            arrays.append((column.values, column.offsets[list(cuts)].tolist()))
        else:
            arrays.append((column, list(cuts)))
    written = b""
    pieces: list[list[tuple[int, int]]] = [[] for _ in cuts[1:]]
    for number, (array, bounds) in enumerate(arrays, start=1):
        edges = [len(written) + array.itemsize * bound for bound in bounds]
        written += array.tobytes()
        if number < len(arrays):
            written += bytes(-len(written) % 64)
        edges[-1] = len(written)
        for block, piece in enumerate(pairwise(edges)):
            pieces[block].append(piece)
    return written, pieces
