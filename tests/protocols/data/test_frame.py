"""Frames have exactly the documented bytes, a checksum covers each byte, and inconsistent headers are refused.

`python -m tests.protocols.data.test_frame` writes the golden frame of a schema version that has none yet.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data import codec
from protocols.data.columns import Batch, concat, empty, take
from protocols.data.frame import cut_rows
from protocols.data.jagged import Array, Jagged
from protocols.data.messages import SCHEMAS, Costs, Experience, LogProbs, Prompts, Rollouts, Scores
from tests.protocols.frames import by_hand, cuts_of, framed, header_of, owners, refusal, sample
from tests.protocols.strategies import messages

GOLDEN = Path(__file__).parent / "golden"
KINDS = [pytest.param(kind, id=kind.__name__) for kind in SCHEMAS.values()]
MANY = concat(
    [msgspec.structs.replace(sample(Rollouts), sample_ids=np.array([2 * copy, 2 * copy + 1])) for copy in range(6)]
)
BROUGHT: dict[type[Batch], dict[str, int]] = {  # column -> the version that added it
    Experience: {"reference": 2, "cost_returns": 3, "cost_values": 3},
    Scores: {"parts": 2, "names": 3},
    Prompts: {"columns": 3},
    Rollouts: {"columns": 2},
}
LOG_PROBS = LogProbs(sample_ids=np.array([5, 6]), log_probs=Jagged.from_rows([[-1], [-2, -3]], np.float32))


def refused(frame: Any) -> bool:
    """Whether a frame is refused with BadFrame; other errors are raised."""
    try:
        codec.decode(frame)
    except codec.BadFrame:
        return True
    return False


# --- the layout


@given(messages(), st.integers(1, 200))
def test_frames_are_what_the_layout_says(message: Batch, block_bytes: int):
    frame = codec.encode(message, term=3, attempt=2, block_bytes=block_bytes)
    assert frame.tobytes() == by_hand(message, cuts_of(frame), term=3, attempt=2)


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        pytest.param(kind, version, id=f"{kind.__name__} {version}")
        for kind in SCHEMAS.values()
        for version in range(kind.oldest_readable, kind.schema_version + 1)
    ],
)
def test_frames_of_every_released_version_stay_readable(kind: type[Batch], version: int):
    frame = (GOLDEN / f"{kind.__name__.lower()}.v{version}.bin").read_bytes()
    assert header_of(frame).version == version
    assert codec.decode(frame) == as_of(sample(kind), version)


def as_of(message: Batch, version: int) -> Batch:
    """The message with the defaults of those jagged columns that a later version added."""
    later = [name for name, brought in BROUGHT.get(type(message), {}).items() if brought > version]
    return msgspec.structs.replace(message, **{name: _filled(message, name) for name in later})


def _filled(message: Batch, name: str) -> Jagged:
    """A jagged column's default: one value per token, or empty rows."""
    column, default = getattr(message, name), message.defaults[name]
    if default == ():
        return Jagged.from_rows([()] * len(message), column.dtype)
    return column.with_values(np.full(len(column.values), default, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_the_same_byte_for_byte(kind: type[Batch]):
    assert golden_frame(kind) == (GOLDEN / f"{kind.__name__.lower()}.v{kind.schema_version}.bin").read_bytes()


def golden_frame(kind: type[Batch]) -> bytes:
    """Two rows in two blocks."""
    return codec.encode(sample(kind), term=7, attempt=1, block_bytes=1).tobytes()


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_a_block_is_as_many_rows_as_fit_and_at_least_one(nbytes: list[int], block_bytes: int):
    ends = np.concatenate([[0], np.cumsum(nbytes, dtype=np.int64)])
    cuts = cut_rows(ends, block_bytes)
    assert cuts[0] == 0
    assert cuts[-1] == len(nbytes)
    for first, stop in pairwise(cuts):
        assert ends[stop] - ends[first] <= block_bytes or stop == first + 1
        assert stop == len(nbytes) or ends[stop + 1] - ends[first] > block_bytes


@pytest.mark.parametrize(("frame_mib", "block_kib"), [(1, 64), (16, 64), (64, 256), (256, 1024), (1024, 1024)], ids=str)
def test_a_block_is_a_256th_of_the_frame_within_limits(frame_mib: int, block_kib: int):
    rows = frame_mib << 10  # of 1 KiB
    sizes = np.diff(cut_rows(np.arange(rows + 1) << 10, None))
    assert sizes.tolist() == [block_kib] * (rows // block_kib)


def test_no_row_is_no_block():
    assert cuts_of(codec.encode(empty(Rollouts))) == [0]


# --- damage to any byte


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_bytes", [None, 1])
def test_every_bit_of_a_small_frame_counts(kind: type[Batch], block_bytes: int | None):
    frame = codec.encode(sample(kind), block_bytes=block_bytes)
    passed = [bit for bit in range(8 * len(frame)) if not refused_with_flip(frame, bit)]
    assert passed == []
    assert codec.decode(frame) == sample(kind)


def test_no_single_flip_reads_as_a_message():
    draw = np.random.default_rng(20260801)
    frames = [codec.encode(sample(kind)) for kind in SCHEMAS.values()]
    frames += [codec.encode(MANY, block_bytes=block_bytes) for block_bytes in (200, None)]
    flips = 200_000 // len(frames) + 1
    for frame in frames:
        bits = draw.integers(0, 8 * len(frame), flips).tolist()
        assert [bit for bit in bits if not refused_with_flip(frame, bit)] == []


def refused_with_flip(frame: Array, bit: int) -> bool:
    frame[bit >> 3] ^= 1 << (bit & 7)
    answer = refused(frame)
    frame[bit >> 3] ^= 1 << (bit & 7)
    return answer


def test_no_truncation_and_no_garbage_reads_as_a_message():
    draw = np.random.default_rng(20260802)
    frames = [codec.encode(sample(kind)) for kind in SCHEMAS.values()] + [codec.encode(MANY, block_bytes=200)]
    for _ in range(12_500):
        frame = frames[draw.integers(len(frames))]
        start, length = int(draw.integers(len(frame))), int(draw.integers(1, 40))
        overwritten = frame.copy()
        noise = draw.integers(0, 256, length, np.uint8)[: len(frame) - start]
        overwritten[start : start + length] = noise
        assert refused(overwritten) or np.array_equal(overwritten, frame)
        assert refused(frame[:start])
        assert refused(draw.bytes(start))
        assert refused(framed(noise.tobytes(), draw.bytes(length)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_frame_is_refused_at_every_length(kind: type[Batch]):
    frame = codec.encode(sample(kind))
    assert [length for length in range(len(frame)) if not refused(frame[:length])] == []


@pytest.mark.parametrize("garbage", [b"\0", b"garbage", b"\0" * 64])
def test_bytes_after_the_frame_are_refused(garbage: bytes):
    frame = codec.encode(sample(Scores)).tobytes()
    assert refusal(frame + garbage) == f"frame is {len(frame) + len(garbage)} bytes long, its header says {len(frame)}"


def test_a_flip_is_seen_by_whoever_reads_its_block_and_by_nobody_else():
    draw = np.random.default_rng(20260803)
    frame = codec.encode(MANY, block_bytes=200)
    cuts = cuts_of(frame)
    assert len(cuts) > 4
    owner = owners(MANY, cuts, len(frame))
    for _ in range(5_000):
        first, stop = np.sort(draw.choice(len(MANY) + 1, 2, replace=False))
        rows = np.arange(first, stop) if draw.random() < 0.5 else draw.permutation(len(MANY))[: stop - first]
        position = draw.integers(len(frame))
        read = {-1, *(np.searchsorted(cuts, rows, side="right") - 1)}
        bit = np.uint8(1 << draw.integers(8))
        frame[position] ^= bit
        try:
            assert codec.open_frame(frame).read(rows) == take(MANY, rows)
            assert owner[position] not in read
        except codec.BadFrame:
            assert owner[position] in read
        frame[position] ^= bit


# --- inconsistent headers with correct checksums


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes):
    refusal(garbage)
    refusal(framed(garbage))
    with pytest.raises(codec.BadFrame):
        header_of(garbage)


json = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.floats() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
count = st.integers(0, 2**64 - 1) | st.integers(0, 3)
columns = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["sample_ids", "scores", "log_probs", "other"]),
        "dtype": st.sampled_from(["int64", "float32", "object", "<U8"]),
        "jagged": st.booleans(),
    }
)
tables = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=9).map(
    lambda numbers: np.array(numbers, "<u4").tobytes()
)
headers = st.fixed_dictionaries(
    {
        "schema": st.sampled_from([3, 5]) | count,
        "version": st.integers(0, 2) | count,
        "term": count,
        "attempt": count,
        "rows": count,
        "columns": st.lists(columns, max_size=4),
        "blocks": tables | st.binary(max_size=40),
    }
)


@given(json | headers, st.binary(min_size=1, max_size=100))
def test_no_header_is_believed_because_its_checksum_holds(header: object, arrays: bytes):
    refusal(framed(header, arrays))


@given(tables, count)
def test_no_counts_are_believed_because_the_header_is_good(table: bytes, rows: int):
    refusal(by_hand(LOG_PROBS, [0, 1, 2], blocks=table, rows=rows))


def test_a_deeply_nested_header_is_refused():
    for nested in (b"\x91" * 60_000, b"\x81\xa1x" + b"\x91" * 60_000):  # instead of the header, and in an unknown field
        assert "header of the frame" in refusal(framed(nested))


def test_more_columns_than_a_message_may_have_are_refused():
    column = {"name": "x", "dtype": "int8", "jagged": False}
    assert "length <= 256" in refusal(by_hand(LOG_PROBS, [0, 2], columns=[column] * 257))


def test_a_frame_says_who_it_is():
    frame = codec.encode(sample(Scores))
    assert refusal(b"") == "frame of 0 bytes is shorter than the 20 before a header"
    assert "starts with b'PK" in refusal(b"PK\x03\x04" + frame[4:].tobytes())
    frame[4] = 1
    assert refusal(frame) == "frame format 1, this reader knows format 2"


def test_counts_decide_where_the_frame_ends():
    good = by_hand(LOG_PROBS, [0, 2])
    checksum = header_of(good).blocks[-4:]

    def reason(*numbers: int) -> str:
        table = struct.pack(f"<{len(numbers)}I", *numbers) + checksum
        return refusal(by_hand(LOG_PROBS, [0, 2], blocks=table))

    assert reason(2, 4) == f"frame is {len(good)} bytes long, its header says {len(good) + 4}"
    assert "its header says 17179869" in reason(2, 2**32 - 1)
    assert reason(3, 3) == "blocks have 3 rows, the frame 2; none may be empty"
    assert reason(2, 3, 0, 0, 0) == "blocks have 2 rows, the frame 2; none may be empty"
    assert reason(2) == "table of 8 bytes is not made of blocks of 3 numbers"


def test_every_count_of_the_largest_table_adds_up_without_overflow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codec, "MAX_ROWS", 2**63)
    table = np.full((2**12, 3), 2**32 - 1, "<u4")
    frame = by_hand(LOG_PROBS, [0, 2], blocks=table.tobytes(), rows=2**12 * (2**32 - 1))
    assert "its header says 281474976" in refusal(frame)


@pytest.mark.parametrize("cuts", [[0, 2], [0, 1, 2]])
@pytest.mark.parametrize("rows", [[0, 1], [1, 0], [1]])
@pytest.mark.parametrize("lengths", [[1, 3], [2**32 - 1, 3], [0, 4]])
def test_row_lengths_add_up_to_the_values_of_their_block(cuts: list[int], rows: list[int], lengths: list[int]):
    frame = codec.open_frame(by_hand(LOG_PROBS, cuts, lengths={"log_probs": np.array(lengths, np.uint32)}))
    with pytest.raises(
        codec.BadFrame, match=r"LogProbs: log_probs: block \d has \d+ values by its rows' lengths, \d by"
    ):
        frame.read(rows)


def test_columns_are_known_once_and_by_type():
    ids, values = msgspec.to_builtins(header_of(codec.encode(empty(Costs))).columns)

    def reason(*columns: dict[str, Any]) -> str:
        return refusal(by_hand(empty(Costs), [0], columns=columns))

    assert reason(ids, values, values) == "column costs occurs twice"
    assert reason(ids, values | {"dtype": "object"}) == "column costs: unknown type object"
    assert reason(ids, values | {"dtype": "float64"}) == "Costs version 1: column costs is float64, want float32"
    assert reason(ids, values | {"jagged": True}) == "Costs version 1: column costs is jagged float32, want float32"
    assert reason(ids) == "Costs version 1 lacks column costs"
    assert reason(ids, values, values | {"name": "extra"}) == "Costs version 1 has no column extra"


def test_frames_older_than_the_oldest_that_is_read_are_refused_by_name():
    old = by_hand(empty(Prompts), [0], version=1)
    assert refusal(old) == "Prompts version 1 is older than 2, the oldest that this program reads"


def write_golden() -> None:
    """Write the golden frames that don't exist yet; a released one never changes."""
    GOLDEN.mkdir(exist_ok=True)
    for kind in SCHEMAS.values():
        path = GOLDEN / f"{kind.__name__.lower()}.v{kind.schema_version}.bin"
        if not path.exists():
            path.write_bytes(golden_frame(kind))


if __name__ == "__main__":
    write_golden()
