"""Frames: what was written is what is read, without a copy, and nothing else is ever read.

`python -m tests.protocols.test_codec` writes the golden frame of a schema version that has none yet.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import codec
from protocols.columns import Batch, Float32, Jagged, JaggedFloat32, JaggedInt32, Text, columns_of, empty
from protocols.messages import SCHEMAS, LogProbs, Rollouts, Scores
from tests.protocols.strategies import messages

GOLDEN = Path(__file__).parent / "golden"
KINDS = [pytest.param(kind, id=kind.__name__) for kind in SCHEMAS.values()]


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


def scores(ids: list[int], values: list[float]) -> Scores:
    return Scores(sample_ids=np.array(ids, np.int64), scores=np.array(values, np.float32))


def framed(header: object, tail: bytes = b"") -> bytes:
    """A frame with intact checksums around any header and tail, written from the documented layout alone."""
    packed = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    prologue = struct.pack("<4sIQ", b"AFLO", 1, len(packed))
    head = prologue + struct.pack("<I", zlib.crc32(prologue + packed)) + packed
    tail = b"\0" * (-len(head) % 64) + tail
    return head + tail + struct.pack("<I", zlib.crc32(tail))


def header_of(frame: np.ndarray, **changes: object) -> dict[str, object]:
    return msgspec.to_builtins(codec.read_header(frame)) | changes


def refusal(frame: Any, **options: Any) -> str:
    """The reason for which a frame is refused."""
    with pytest.raises(codec.BadFrame) as caught:
        codec.decode(frame, **options)
    assert caught.value.reason == str(caught.value)
    return caught.value.reason


# --- what was written is read


@given(messages(), st.integers(0, 2**40), st.integers(0, 9))
def test_a_message_comes_back(message: Batch, term: int, attempt: int):
    frame = codec.encode(message, term, attempt)
    assert codec.decode(frame) == message
    header = codec.read_header(frame)
    assert (header.schema, header.version) == (message.schema_id, message.schema_version)
    assert (header.term, header.attempt, header.rows) == (term, attempt, len(message))
    assert [(c.name, c.dtype, c.jagged) for c in header.columns] == [
        (c.name, c.dtype, c.jagged) for c in columns_of(type(message))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_are_a_message(kind: type[Batch]):
    assert codec.decode(codec.encode(empty(kind))) == empty(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_aligned_read_only_views_of_the_frame(kind: type[Batch]):
    frame = codec.encode(sample(kind))
    assert frame.dtype == np.uint8
    assert frame.ctypes.data % 64 == 0
    for array in arrays_of(codec.decode(frame)):
        assert np.shares_memory(array, frame)
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable


def arrays_of(message: Batch) -> Iterator[np.ndarray]:
    for spec in columns_of(type(message)):
        column = getattr(message, spec.name)
        yield from (column.values, column.offsets) if isinstance(column, Jagged) else (column,)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview, np.array])
def test_any_contiguous_buffer_is_read(form: Any):
    message = sample(Rollouts)
    assert codec.decode(form(codec.encode(message))) == message
    assert codec.read_header(form(codec.encode(message))).rows == 2


def test_a_frame_may_start_anywhere_in_memory():
    frame = codec.encode(sample(Rollouts)).tobytes()
    assert codec.decode(memoryview(b"x" + frame)[1:]) == sample(Rollouts)


def test_the_header_is_read_without_the_columns():
    frame = codec.encode(sample(Rollouts), term=3)
    frame[-100:] ^= 0xFF
    end = 20 + int.from_bytes(frame[8:16].tobytes(), "little")
    assert codec.read_header(frame) == codec.read_header(frame[:end])
    with pytest.raises(codec.BadFrame, match="header of"):
        codec.read_header(frame[: end - 1])


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_every_released_version_stay_readable(kind: type[Batch]):
    assert codec.decode((GOLDEN / f"{kind.__name__.lower()}.v1.bin").read_bytes()) == sample(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_the_same_byte_for_byte(kind: type[Batch]):
    golden = GOLDEN / f"{kind.__name__.lower()}.v{kind.schema_version}.bin"
    assert codec.encode(sample(kind), term=7, attempt=1).tobytes() == golden.read_bytes()


def test_encode_refuses_a_column_of_another_form():
    ids = np.array([1], np.int64)
    cases: list[tuple[Any, str]] = [
        (np.zeros(1), "Scores.scores is float64, want float32"),
        (np.zeros(2, np.float32), "Scores.scores: 2 rows, sample_ids has 1"),
        (np.zeros((1, 2), np.float32), r"Scores.scores: shape \[1, 2\], want one value a row"),
        (Jagged.from_rows([[0.0]], np.float32), "Scores.scores is jagged float32, want float32"),
    ]
    for column, reason in cases:
        with pytest.raises(ValueError, match=reason):
            codec.encode(Scores(sample_ids=ids, scores=column))
    with pytest.raises(ValueError, match="term -1"):
        codec.encode(scores([1], [1]), term=-1)


# --- damage: every byte counts


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_a_small_frame_counts(kind: type[Batch]):
    frame = codec.encode(sample(kind))
    for position in range(len(frame)):
        bit = np.uint8(1 << position % 8)
        frame[position] ^= bit
        refusal(frame)
        frame[position] ^= bit
    assert codec.decode(frame) == sample(kind)


def test_no_random_damage_reads_as_a_message():
    draw = random.Random(20260801)
    frames = [codec.encode(sample(kind)) for kind in SCHEMAS.values()]
    for _ in range(4000):
        frame = draw.choice(frames).copy()
        for _ in range(draw.choice([1, 1, 2, 8])):
            position = draw.randrange(len(frame))
            # addition, so that a second hit of a byte never restores it
            frame[position] = (int(frame[position]) + draw.choice([1, 2, 4, 8, 16])) % 256
        refusal(frame)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_frame_is_refused_at_every_length(kind: type[Batch]):
    frame = codec.encode(sample(kind))
    for length in range(len(frame)):
        refusal(frame[:length])


@pytest.mark.parametrize("garbage", [b"\0", b"garbage", b"\0" * 64])
def test_bytes_after_the_frame_are_refused(garbage: bytes):
    frame = codec.encode(sample(Scores)).tobytes()
    assert refusal(frame + garbage) == f"frame is {len(frame) + len(garbage)} bytes long, its header says {len(frame)}"


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes):
    refusal(garbage)
    refusal(framed(garbage))
    with pytest.raises(codec.BadFrame):
        codec.read_header(garbage)


json = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
count = st.integers(0, 2**64 - 1) | st.integers(0, 3)
columns = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["sample_ids", "scores", "other"]),
        "dtype": st.sampled_from(["int64", "float32", "object", "<U8"]),
        "jagged": st.booleans(),
        "size": count,
    }
)
headers = st.fixed_dictionaries(
    {"schema": count, "version": count, "term": count, "attempt": count, "rows": count, "columns": st.lists(columns)}
)


@given(json | headers, st.binary(max_size=100))
def test_no_header_is_believed_because_its_checksum_holds(header: object, tail: bytes):
    refusal(framed(header, tail))


def test_a_deeply_nested_header_is_refused():
    for nested in (b"\x91" * 60_000, b"\x81\xa1x" + b"\x91" * 60_000):  # in place of the header, in an unknown field
        assert "header of the frame" in refusal(framed(nested))


def test_a_header_of_unreasonable_size_is_refused():
    assert "at most 65536" in refusal(framed(b"\x91" * 70_000))


def test_a_frame_says_who_it_is():
    frame = codec.encode(sample(Scores))
    assert refusal(b"") == "frame of 0 bytes is shorter than the 20 before a header"
    assert "starts with b'PK" in refusal(b"PK\x03\x04" + frame[4:].tobytes())
    frame[4] = 2
    assert refusal(frame) == "frame format 2, this reader knows format 1"


def test_only_contiguous_bytes_are_a_frame():
    frame = codec.encode(sample(Scores))
    for buffer in (frame[::2], frame.reshape(2, -1), frame.view(np.int8), memoryview(frame.tobytes())[::2]):
        assert "contiguous" in refusal(buffer)


# --- intact bytes that mean nothing


def test_meaning_is_checked_after_the_bytes():
    cases = [
        (scores([1], [float("nan")]), "Scores: scores: 1 of 1 values are not finite"),
        (scores([-1], [0]), "Scores: sample_ids: negative id -1"),
        (scores([1, 1], [0, 0]), "Scores: sample_ids: an id occurs twice in 2 rows"),
    ]
    for message, reason in cases:
        assert refusal(codec.encode(message)) == reason


def test_offsets_that_leave_the_values_are_refused():
    header = {"schema": LogProbs.schema_id, "version": 1, "term": 0, "attempt": 0, "rows": 1}
    described = [
        {"name": "sample_ids", "dtype": "int64", "jagged": False, "size": 1},
        {"name": "log_probs", "dtype": "float32", "jagged": True, "size": 1},
    ]
    tail = struct.pack("<q56xqq48xf", 5, 0, 9, -1.0)
    reason = refusal(framed(header | {"columns": described}, tail))
    assert reason == "LogProbs: jagged offsets must rise from 0 to 1, got 0 to 9"


def test_limits_are_the_readers():
    frame = codec.encode(scores([1, 2, 3], [0, 0, 0]))
    assert refusal(frame, limits=codec.Limits(max_rows=2)) == "frame of 3 rows, at most 2 are accepted"
    assert "at most 100 are accepted" in refusal(frame, limits=codec.Limits(max_frame_bytes=100))
    assert len(codec.decode(frame, limits=codec.Limits(len(frame), 3))) == 3


def test_an_unknown_schema_is_named():
    frame = codec.encode(sample(Scores))
    reason = refusal(frame, schemas={LogProbs.schema_id: LogProbs})
    assert reason == "unknown schema 5, version 1; this reader knows 3 LogProbs"


def test_columns_are_known_once_and_by_type():
    frame = codec.encode(scores([], []))
    described = msgspec.to_builtins(codec.read_header(frame).columns)

    def reason(*columns: dict[str, Any]) -> str:
        return refusal(framed(header_of(frame, columns=columns)))

    ids, values = described
    assert reason(ids, values, values) == "column scores occurs twice"
    assert reason(ids, values | {"dtype": "object"}) == "column scores: unknown type object"
    assert reason(ids, values | {"size": 4}) == "column scores: 4 values in 0 rows"
    assert reason(ids, values | {"dtype": "float64"}) == "Scores version 1: column scores is float64, want float32"
    assert reason(ids) == "Scores version 1 lacks column scores"
    assert reason(ids, values, values | {"name": "extra"}) == "Scores version 1 has no column extra"


# --- schemas grow


class Draft(Batch, frozen=True, kw_only=True, eq=False):
    """Version 1 of a schema."""

    schema_id: ClassVar[int] = 900
    tokens: JaggedInt32


class Grown(Batch, frozen=True, kw_only=True, eq=False):
    """Version 2: more columns, each with a default."""

    schema_id: ClassVar[int] = 900
    schema_version: ClassVar[int] = 2
    aligned: ClassVar = (("tokens", "weights"),)
    defaults: ClassVar = {"weights": 1.0, "bonus": 0.5, "notes": (), "hints": (7, 8)}

    tokens: JaggedInt32
    weights: JaggedFloat32
    bonus: Float32
    notes: Text
    hints: JaggedInt32


class Demanding(Batch, frozen=True, kw_only=True, eq=False):
    """Another version 2, whose new column has no default."""

    schema_id: ClassVar[int] = 900
    schema_version: ClassVar[int] = 2
    tokens: JaggedInt32
    bonus: Float32


DRAFT = Draft(sample_ids=np.array([4, 9]), tokens=Jagged.from_rows([[1, 2], [3]], np.int32))
GROWN = Grown(
    sample_ids=DRAFT.sample_ids,
    tokens=DRAFT.tokens,
    weights=DRAFT.tokens.with_values(np.ones(3, np.float32)),
    bonus=np.array([0.5, 0.5], np.float32),
    notes=Jagged.from_texts(["", ""]),
    hints=Jagged.from_rows([[7, 8], [7, 8]], np.int32),
)


def test_a_frame_of_an_older_version_gets_the_defaults():
    assert codec.decode(codec.encode(DRAFT), schemas={900: Grown}) == GROWN


def test_a_frame_of_a_newer_version_is_read_without_its_new_columns():
    assert codec.decode(codec.encode(GROWN), schemas={900: Draft}) == DRAFT


def test_a_column_without_a_default_is_needed():
    assert refusal(codec.encode(DRAFT), schemas={900: Demanding}) == "Demanding version 1 lacks column bonus"


def test_only_an_older_frame_may_lack_a_column():
    frame = codec.encode(empty(Draft))
    same_version = framed(header_of(frame, version=2), b"\0" * 64)
    assert refusal(same_version, schemas={900: Grown}) == "Grown version 2 lacks column weights"


def write_golden() -> None:
    """Write the frames that are not released yet; a released one never changes."""
    GOLDEN.mkdir(exist_ok=True)
    for kind in SCHEMAS.values():
        path = GOLDEN / f"{kind.__name__.lower()}.v{kind.schema_version}.bin"
        if not path.exists():
            path.write_bytes(codec.encode(sample(kind), term=7, attempt=1).tobytes())


if __name__ == "__main__":
    write_golden()
