"""Messages are decoded from their frames, completely or by rows, and only if they are valid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data import codec
from protocols.data.columns import Batch, Float32, Int64, JaggedFloat32, JaggedInt32, Text, columns_of, empty, take
from protocols.data.jagged import Array, Jagged
from protocols.data.messages import SCHEMAS, LogProbs, Rollouts, Scores
from tests.protocols.frames import by_hand, cuts_of, header_of, owners, refusal, sample
from tests.protocols.strategies import messages

KINDS = [pytest.param(kind, id=kind.__name__) for kind in SCHEMAS.values()]


def scores(ids: list[int], values: list[float]) -> Scores:
    return Scores(sample_ids=np.array(ids, np.int64), scores=np.array(values, np.float32))


def arrays_of(message: Batch) -> Iterator[Array]:
    for spec in columns_of(type(message)):
        column = getattr(message, spec.name)
        yield column.values if isinstance(column, Jagged) else column


# --- encode and decode


@given(messages(), st.integers(0, 2**40), st.integers(0, 9), st.none() | st.integers(1, 200))
def test_a_message_comes_back(message: Batch, term: int, attempt: int, block_bytes: int | None):
    frame = codec.encode(message, term, attempt, block_bytes=block_bytes)
    assert codec.decode(frame) == message
    header = header_of(frame)
    assert (header.schema, header.version) == (message.schema_id, message.schema_version)
    assert (header.term, header.attempt, header.rows) == (term, attempt, len(message))
    assert [(c.name, c.dtype, c.jagged) for c in header.columns] == [
        (c.name, c.dtype, c.jagged) for c in columns_of(type(message))
    ]


@given(messages(), st.integers(0, 2**62), st.integers(500, 3000))
def test_pieces_cut_within_a_size_have_frames_of_that_size_and_one_fewer_could_not(
    message: Batch, term: int, most: int
):
    cuts = codec.cut_within(message, most)
    frames = [codec.encode(take(message, rows), term) for rows in cuts]
    assert all(frame.nbytes <= most for frame in frames)
    assert [row for rows in cuts for row in rows.tolist()] == (list(range(len(message))) if cuts else [])
    if not cuts and len(message):
        padding = 64 * (2 + sum(1 + spec.jagged for spec in columns_of(type(message))))
        assert max(codec.encode(take(message, [row])).nbytes for row in range(len(message))) + padding > most


def test_pieces_are_as_even_as_they_can_be():
    message = LogProbs(sample_ids=np.arange(9), log_probs=Jagged.from_rows([np.zeros(100, np.float32)] * 9))
    assert [len(rows) for rows in codec.cut_within(message, 3000)] == [5, 4]
    assert codec.cut_within(message, 1 << 20)[0].tolist() == list(range(9))
    assert codec.cut_within(message, 400) == [], "a row alone needs more"


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_are_a_message(kind: type[Batch]):
    assert codec.decode(codec.encode(empty(kind))) == empty(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_aligned_read_only_views_of_the_frame(kind: type[Batch]):
    frame = codec.encode(sample(kind), block_bytes=1)
    assert frame.dtype == np.uint8
    assert frame.ctypes.data % 64 == 0
    for array in arrays_of(codec.decode(frame)):
        assert np.shares_memory(array, frame)
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview, np.array])
def test_any_contiguous_buffer_is_read(form: Any):
    message = sample(Rollouts)
    assert codec.decode(form(codec.encode(message))) == message
    assert header_of(form(codec.encode(message))).rows == 2


def test_a_frame_may_start_anywhere_in_memory():
    frame = codec.encode(sample(Rollouts)).tobytes()
    assert codec.decode(memoryview(b"x" + frame)[1:]) == sample(Rollouts)


def test_only_contiguous_bytes_are_a_frame():
    frame = codec.encode(sample(Scores))
    for buffer in (frame[::2], frame.reshape(2, -1), frame.view(np.int8), memoryview(frame.tobytes())[::2]):
        assert "contiguous" in refusal(buffer)


def test_the_header_is_read_without_the_columns():
    frame = codec.encode(sample(Rollouts), term=3)
    end = codec.open_frame(frame).bytes_read
    assert header_of(frame[:end]) == header_of(frame)
    with pytest.raises(codec.BadFrame, match="header of"):
        header_of(frame[: end - 1])


def test_encode_refuses_a_column_of_another_form():
    ids = np.array([1], np.int64)
    cases: list[tuple[Any, str]] = [
        (np.zeros(1), "Scores.scores is float64, want float32"),
        ([0.0], "Scores.scores is a list, want float32 in a ndarray"),
        (np.zeros(2, np.float32), "Scores.scores: 2 rows, sample_ids has 1"),
        (np.zeros((1, 2), np.float32), r"Scores.scores: shape \[1, 2\], want one value a row"),
        (Jagged.from_rows([[0.0]], np.float32), "Scores.scores is jagged float32, want float32"),
    ]
    for column, reason in cases:
        with pytest.raises(ValueError, match=reason):
            codec.encode(Scores(sample_ids=ids, scores=column))


def test_encode_refuses_numbers_that_mean_nothing():
    with pytest.raises(ValueError, match="term -1"):
        codec.encode(scores([1], [1]), term=-1)
    with pytest.raises(ValueError, match="block_bytes 0"):
        codec.encode(scores([1], [1]), block_bytes=0)


def test_encode_refuses_what_every_reader_would():
    values = np.broadcast_to(np.uint8(65), 2**32)  # without allocating memory
    text = Jagged(values, np.array([0, 2**32]))
    with pytest.raises(ValueError, match=r"Note of 1 rows and 4294967320 bytes: readers accept .* cut it"):
        codec.encode(Note(sample_ids=np.array([1]), text=text))


class Note(Batch, frozen=True, kw_only=True, eq=False):
    text: Text


# --- some rows of a frame


@given(messages(min_rows=1), st.integers(1, 120), st.data())
def test_reading_rows_is_taking_them_from_the_message(message: Batch, block_bytes: int, data: st.DataObject):
    frame = codec.open_frame(codec.encode(message, block_bytes=block_bytes))
    assert len(frame) == len(message)
    for _ in range(3):
        rows = data.draw(st.permutations(range(len(message))))[: data.draw(st.integers(0, len(message)))]
        assert frame.read(rows) == take(message, rows)
    assert frame.read() == message


@given(messages(min_rows=1), st.integers(1, 120), st.data())
def test_only_the_blocks_of_the_rows_are_read_and_counted(message: Batch, block_bytes: int, data: st.DataObject):
    encoded = codec.encode(message, block_bytes=block_bytes)
    cuts = cuts_of(encoded)
    rows = data.draw(st.permutations(range(len(message))))[: data.draw(st.integers(1, len(message)))]
    owner = owners(message, cuts, len(encoded))
    needed = np.isin(owner, [-1, *(np.searchsorted(cuts, rows, side="right") - 1)])
    encoded[~needed] = 0xFF
    frame = codec.open_frame(encoded)
    assert frame.bytes_read == (owner == -1).sum()
    for _ in range(2):
        assert frame.read(rows) == take(message, rows)
        assert frame.bytes_read == needed.sum()


def test_a_run_of_rows_shares_the_frames_memory_and_others_are_copied():
    encoded = codec.encode(sample(Rollouts), block_bytes=1)
    frame = codec.open_frame(encoded)
    for rows, shared in [([0], True), (range(2), True), ([1, 0], False)]:
        for array in arrays_of(frame.read(rows)):
            assert np.shares_memory(array, encoded) == (shared and array.size > 0)
            assert not array.flags.writeable


@pytest.mark.parametrize("tokens", [1, 1000])  # short rows are copied value by value, long ones row by row
def test_rows_of_any_length_are_copied_in_any_order(tokens: int):
    written = [np.arange(row, row + tokens + row % 3, dtype=np.float32) for row in range(40)]
    message = LogProbs(sample_ids=np.arange(40), log_probs=Jagged.from_rows(written))
    rows = [39, 3, 4, 5, 17, 0]
    read = codec.open_frame(codec.encode(message, block_bytes=50)).read(rows)
    assert isinstance(read, LogProbs)
    assert [row.tolist() for row in read.log_probs] == [written[row].tolist() for row in rows]


def test_no_rows_are_read_without_a_block():
    frame = codec.open_frame(codec.encode(sample(Rollouts)))
    before = frame.bytes_read
    assert frame.read([]) == empty(Rollouts)
    assert frame.bytes_read == before


def test_a_block_is_verified_once():
    encoded = codec.encode(sample(LogProbs), block_bytes=1)
    frame = codec.open_frame(encoded)
    padding = frame.bytes_read + 16  # after two ids
    frame.read()
    encoded[padding] ^= 1
    assert frame.read() == sample(LogProbs)
    assert refusal(encoded) == "rows 1 to 1 are damaged: the checksum of block 1 differs"


def test_a_damaged_block_leaves_the_others_readable():
    encoded = codec.encode(sample(LogProbs), block_bytes=1)
    encoded[codec.open_frame(encoded).bytes_read] ^= 1  # the first id
    frame = codec.open_frame(encoded)
    for _ in range(2):
        with pytest.raises(codec.BadFrame, match="rows 0 to 0 are damaged: the checksum of block 0 differs"):
            frame.read()
        assert frame.read([1]) == take(sample(LogProbs), [1])


def test_rows_are_judged_by_their_own_meaning():
    frame = codec.open_frame(codec.encode(scores([1, 2, 1], [0, float("nan"), 0])))
    assert frame.read([0]) == scores([1], [0])
    with pytest.raises(codec.BadFrame, match="1 of 2 values are not finite"):
        frame.read([0, 1])
    with pytest.raises(codec.BadFrame, match="an id occurs twice"):
        frame.read([2, 0])


@pytest.mark.parametrize(
    ("rows", "error", "reason"),
    [
        ([2], IndexError, "row 2 of a frame of 2 rows"),
        ([0, -1], IndexError, "row -1 of a frame of 2 rows"),
        ([1, 0, 1], ValueError, "row 1 is selected twice"),
        ([True, False], ValueError, "flat row indices, got bool"),
        ([[0]], ValueError, "flat row indices, got int64"),
        ([0.5], ValueError, "flat row indices, got float64"),
    ],
)
def test_rows_that_cannot_be_read_are_the_callers_error(rows: npt.ArrayLike, error: type[Exception], reason: str):
    with pytest.raises(error, match=reason):
        codec.open_frame(codec.encode(sample(Scores))).read(rows)


# --- intact bytes of invalid messages


def test_meaning_is_checked_after_the_bytes():
    cases = [
        (scores([1], [float("nan")]), "Scores: scores: 1 of 1 values are not finite"),
        (scores([-1], [0]), "Scores: sample_ids: negative id -1"),
        (scores([1, 1], [0, 0]), "Scores: sample_ids: an id occurs twice in 2 rows"),
    ]
    for message, reason in cases:
        assert refusal(codec.encode(message)) == reason


def test_a_reader_refuses_frames_beyond_its_limits(monkeypatch: pytest.MonkeyPatch):
    frame = codec.encode(scores([1, 2, 3], [0, 0, 0]))
    monkeypatch.setattr(codec, "MAX_ROWS", 3)
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", len(frame))
    assert len(codec.decode(frame)) == 3
    monkeypatch.setattr(codec, "MAX_ROWS", 2)
    assert refusal(frame) == "frame of 3 rows, at most 2 are accepted"
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 100)
    assert "at most 100 are accepted" in refusal(frame)


def test_an_unknown_schema_is_named():
    frame = codec.encode(sample(Scores))
    reason = refusal(frame, schemas={LogProbs.schema_id: LogProbs})
    assert reason == "unknown schema 5, version 3; this reader knows 3 LogProbs"


# --- schemas grow


class Draft(Batch, frozen=True, kw_only=True, eq=False):
    """Version 1 of a schema."""

    schema_id: ClassVar[int] = 900
    responses: JaggedInt32


class Grown(Batch, frozen=True, kw_only=True, eq=False):
    """Version 2: more columns, each with a default."""

    schema_id: ClassVar[int] = 900
    schema_version: ClassVar[int] = 2
    aligned: ClassVar = ("responses", "weights")
    defaults: ClassVar = {"weights": 1.0, "bonus": 0.5, "notes": (), "hints": (7, 8)}

    responses: JaggedInt32
    weights: JaggedFloat32
    bonus: Float32
    notes: Text
    hints: JaggedInt32


class Demanding(Batch, frozen=True, kw_only=True, eq=False):
    """Another version 2, whose new column has no default."""

    schema_id: ClassVar[int] = 900
    schema_version: ClassVar[int] = 2
    responses: JaggedInt32
    bonus: Int64


DRAFT = Draft(sample_ids=np.array([4, 9]), responses=Jagged.from_rows([[1, 2], [3]], np.int32))
GROWN = Grown(
    sample_ids=DRAFT.sample_ids,
    responses=DRAFT.responses,
    weights=DRAFT.responses.with_values(np.ones(3, np.float32)),
    bonus=np.array([0.5, 0.5], np.float32),
    notes=Jagged.from_texts(["", ""]),
    hints=Jagged.from_rows([[7, 8], [7, 8]], np.int32),
)

every_way = pytest.mark.parametrize("rows", [[], [0], [1], [0, 1], [1, 0]], ids=str)


@every_way
def test_a_frame_of_an_older_version_gets_the_defaults(rows: list[int]):
    frame = codec.open_frame(codec.encode(DRAFT, block_bytes=1), schemas={900: Grown})
    read = frame.read(rows)
    assert read == take(GROWN, rows)
    assert not any(array.flags.writeable for array in arrays_of(read))


@every_way
def test_a_frame_of_a_newer_version_is_read_without_its_new_columns(rows: list[int]):
    frame = codec.open_frame(codec.encode(GROWN, block_bytes=1), schemas={900: Draft})
    assert frame.read(rows) == take(DRAFT, rows)


def test_columns_that_are_ignored_are_verified():
    frame = codec.encode(GROWN)
    frame[-1] ^= 1  # of the hints
    assert "damaged" in refusal(frame, schemas={900: Draft})


def test_a_column_without_a_default_is_needed():
    assert refusal(codec.encode(DRAFT), schemas={900: Demanding}) == "Demanding version 1 lacks column bonus"


class TooMany(Batch, frozen=True, kw_only=True, eq=False):
    """Claims to be version 1, and has a column that version 1 lacks."""

    schema_id: ClassVar[int] = 900
    schema_version: ClassVar[int] = 1
    responses: JaggedInt32
    bonus: Int64


def test_only_a_newer_frame_may_have_a_column_that_is_unknown():
    frame = codec.encode(
        TooMany(sample_ids=DRAFT.sample_ids, responses=DRAFT.responses, bonus=np.array([1, 2], np.int64))
    )
    assert refusal(frame, schemas={900: Draft}) == "Draft version 1 has no column bonus"


def test_only_an_older_frame_may_lack_a_column():
    assert refusal(by_hand(DRAFT, [0, 2], version=2), schemas={900: Grown}) == "Grown version 2 lacks column weights"
