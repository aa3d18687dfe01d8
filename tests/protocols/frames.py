"""Frames built by hand from the documented layout: expected frames for the codec, and malformed ones to refuse."""

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
from protocols.data.columns import Batch, columns_of
from protocols.data.frame import Buffer, Header, bytes_of, unseal
from protocols.data.jagged import Array, Jagged

Cuts = Sequence[int]  # the first row of each block, and N


def sample(kind: type[Batch]) -> Batch:
    """Two rows, one with three values and one with none. The golden frames hold these, so they must not change."""
    columns: dict[str, Any] = {}
    for number, spec in enumerate(columns_of(kind)):
        values = np.arange(number, number + 3).astype(spec.dtype)
        if spec.name == "references":
            columns[spec.name] = Jagged.from_texts(["42", "π"])
        elif spec.name == "columns":
            columns[spec.name] = Jagged.from_texts(['{"level": 3}', ""])
        elif spec.name == "names":
            columns[spec.name] = Jagged.from_texts(["right\nbegun\nlike", ""])
        elif spec.name in ("loss_mask", "finishes"):
            flags = np.array([0, 1, 1], np.uint8)
            columns[spec.name] = Jagged.from_lengths(flags, [3, 0]) if spec.jagged else flags[:2]
        else:
            columns[spec.name] = Jagged.from_lengths(values, [3, 0]) if spec.jagged else values[:2]
    return kind(**columns)


def framed(header: object, arrays: bytes = b"") -> bytes:
    """A frame with this header, a correct checksum, and these bytes after it."""
    packed = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    prologue = struct.pack("<4sIQ", b"AFLO", 2, len(packed))
    padded = packed + bytes(-(20 + len(packed)) % 64)
    return prologue + struct.pack("<I", zlib.crc32(prologue + padded)) + padded + arrays


def by_hand(message: Batch, cuts: Cuts, lengths: Mapping[str, Array] | None = None, **changes: object) -> bytes:
    """A message's frame, with `lengths` instead of a column's row lengths, and `changes` to its header."""
    arrays, ranges = _arrays(message, cuts, lengths or {})
    table = b""
    for block, (first, stop) in enumerate(pairwise(cuts)):
        checksum = zlib.crc32(b"".join(arrays[start:end] for start, end in ranges[block]))
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
    """For each byte of the message's frame: the block whose checksum covers it, -1 for the header."""
    arrays, ranges = _arrays(message, cuts, {})
    owner = np.full(nbytes, -1)
    for block, spans in enumerate(ranges):
        for start, end in spans:
            owner[nbytes - len(arrays) :][start:end] = block
    return owner


def header_of(frame: Buffer) -> Header:
    """The verified header of a frame, which may end right after it."""
    return unseal(bytes_of(frame))[0]


def cuts_of(frame: Array) -> list[int]:
    """The first row of each block by a frame's header, and the number of rows."""
    header = header_of(frame)
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
    """The bytes after the header, and the ranges of each block in them."""
    arrays: list[tuple[Array, list[int]]] = []
    for spec in columns_of(type(message)):
        column = getattr(message, spec.name)
        if spec.jagged:
            arrays.append((np.asarray(lengths.get(spec.name, column.lengths), "<u4"), list(cuts)))
            arrays.append((column.values, column.offsets[list(cuts)].tolist()))
        else:
            arrays.append((column, list(cuts)))
    written = b""
    ranges: list[list[tuple[int, int]]] = [[] for _ in cuts[1:]]
    for number, (array, bounds) in enumerate(arrays, start=1):
        edges = [len(written) + array.itemsize * bound for bound in bounds]
        written += array.tobytes()
        if number < len(arrays):
            written += bytes(-len(written) % 64)
        edges[-1] = len(written)
        for block, piece in enumerate(pairwise(edges)):
            ranges[block].append(piece)
    return written, ranges
