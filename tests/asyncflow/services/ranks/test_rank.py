"""A rank reads only its own rows; an unreadable row fails alone, and every row is accounted for exactly once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.channels.endpoint import Frame
from asyncflow.services.ranks.quarantine import MOST_KEPT
from asyncflow.services.ranks.rank import Rank, RowReader, unwrap
from asyncflow.services.ranks.worker_factory import build
from protocols.control.delivery import RankCall, Reading
from protocols.data import codec
from protocols.data.messages import LogProbs, Metrics, Scores, Values
from protocols.layout.row_plan import Segment
from protocols.stage import Failure, Measured, Partial
from tests.asyncflow.services import rows, specs
from tests.asyncflow.services.hosting import SomeAreGone


def reading(*segments: tuple[int, int, int], schema: int = LogProbs.schema_id) -> Reading:
    return Reading(schema, [Segment(*segment) for segment in segments])


def call(samples: Sequence[int], *readings: Reading, method: str = "double") -> RankCall:
    return RankCall(f"a.{method}#1", method, list(samples), list(readings))


def frames(*shards: Sequence[int]) -> list[Frame | None]:
    return [codec.encode(rows.log_probs(shard)) for shard in shards]


def broken(frame: Frame | None) -> Frame:
    assert frame is not None
    return rows.damaged(frame)


# --- reading


def test_rows_come_in_the_order_of_the_call_from_any_number_of_frames():
    reader = RowReader(call([4, 2, 3, 6], reading((1, 0, 1), (0, 1, 3), (1, 2, 3))), frames([1, 2, 3], [4, 5, 6]))
    assert reader.inputs == [rows.log_probs([4, 2, 3, 6])]
    assert (reader.rows, reader.refused, reader.damaged, reader.lost) == (4, {}, [], [])


def test_a_damaged_frame_costs_only_its_own_rows():
    whole, torn = frames([1, 2], [3, 4])
    reader = RowReader(call([3, 1, 2, 4], reading((1, 0, 1), (0, 0, 2), (1, 1, 2))), [whole, broken(torn)])
    assert reader.inputs == [rows.log_probs([1, 2])]
    assert list(reader.refused) == [1]
    assert sorted(row for damage in reader.damaged for row in damage.rows) == [0, 3]
    assert all("its frame was refused: rows 0 to 1 are damaged" in damage.cause for damage in reader.damaged)
    assert {damage.input for damage in reader.damaged} == {0}
    assert reader.lost == []


def test_rows_of_a_frame_that_is_gone_are_lost_and_nothing_is_refused():
    kept, _ = frames([1, 2], [3, 4])
    reader = RowReader(call([3, 1, 2, 4], reading((1, 0, 1), (0, 0, 2), (1, 1, 2))), [kept, None])
    assert reader.inputs == [rows.log_probs([1, 2])]
    assert (reader.lost, reader.damaged, reader.refused) == ([0, 3], [], {})


def test_where_nothing_can_be_read_there_are_no_inputs():
    torn = broken(*frames([1, 2]))
    reader = RowReader(call([1, 2], reading((0, 0, 1), (1, 0, 1))), [torn, None])
    assert (reader.rows, reader.inputs) == (0, [])
    assert (reader.damaged[0].rows, reader.lost) == ([0], [1])


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (codec.encode(rows.scores([1, 2])), "unknown schema 5"),
        (np.frombuffer(b"no frame at all, but long enough for one", np.uint8), "no frame"),
        (np.empty(0, np.uint8), "shorter"),
        (codec.encode(rows.log_probs([1])), "row 1 of a frame of 1 rows"),
        (codec.encode(rows.log_probs([2, 1])), "other rows than its shard names"),
    ],
    ids=["another message", "garbage", "nothing", "fewer rows", "other rows"],
)
def test_a_frame_that_is_not_what_was_named_is_refused_with_its_reason(frame: Frame, reason: str):
    reader = RowReader(call([7, 1, 2], reading((0, 0, 1), (1, 0, 2))), [*frames([7]), frame])
    assert reader.inputs == [rows.log_probs([7])]
    assert [damage.rows for damage in reader.damaged] == [[1, 2]]
    assert reason in reader.damaged[0].cause
    assert reason in reader.refused[1]


def test_a_row_is_accounted_for_once_whatever_happened_to_its_inputs():
    """The first input of row 0 is damaged and its second gone; row 1 the other way round."""
    torn = broken(*frames([1, 2]))
    first = reading((0, 0, 1), (1, 1, 2), (2, 2, 3))
    second = reading((1, 0, 1), (0, 1, 2), (2, 2, 3))
    reader = RowReader(call([1, 2, 3], first, second), [torn, None, *frames([1, 2, 3])])
    assert reader.inputs == [rows.log_probs([3])] * 2
    assert ([d.rows for d in reader.damaged if d.rows], reader.lost) == ([[0]], [1])


KINDS = {LogProbs.schema_id: rows.log_probs, Values.schema_id: rows.values}


@given(st.data(), st.lists(st.integers(0, 99), min_size=1, max_size=10, unique=True))
def test_inputs_stay_aligned_whichever_frames_could_not_be_read(data: st.DataObject, samples: list[int]):
    sent: list[Frame | None] = []
    readings, unreadable = [], set[int]()
    for schema, kind in KINDS.items():
        order = data.draw(st.permutations(samples), label="order")
        middle = data.draw(st.integers(0, len(order)), label="where the second shard begins")
        place = {}
        for shard in (order[:middle], order[middle:]):
            state = data.draw(st.sampled_from(["whole", "whole", "damaged", "lost"]))
            frame = codec.encode(kind(shard))
            place |= {sample: (len(sent), row) for row, sample in enumerate(shard)}
            unreadable |= set(shard) if state != "whole" else set()
            sent.append({"whole": frame, "damaged": rows.damaged(frame), "lost": None}[state])
        readings.append(Reading(schema, [Segment(f, row, row + 1) for f, row in (place[s] for s in samples)]))
    reader = RowReader(call(samples, *readings), sent)
    left = [s for s in samples if s not in unreadable]
    assert reader.rows == len(left)
    assert reader.inputs == ([kind(left) for kind in KINDS.values()] if left else [])
    accounted = [*reader.lost, *(row for damage in reader.damaged for row in damage.rows)]
    assert sorted(samples[row] for row in accounted) == sorted(unreadable)


# --- bytes read

ROW_BYTES = 8 + 4 + 4 * 16  # a row of 16 log-probs: id, length, values
BLOCK_BYTES = 4 * ROW_BYTES
SAMPLES = range(64)


def in_blocks() -> Frame:
    """64 rows of equal size, four per block."""
    return codec.encode(rows.log_probs(SAMPLES, tokens=16), block_bytes=BLOCK_BYTES)


@pytest.mark.parametrize(("start", "stop", "blocks"), [(0, 4, 1), (8, 16, 2), (3, 5, 2), (63, 64, 1), (0, 64, 16)])
def test_only_the_blocks_of_its_rows_are_read(start: int, stop: int, blocks: int):
    frame = in_blocks()
    before_the_rows = codec.open_frame(frame).bytes_read
    reader = RowReader(call(SAMPLES[start:stop], reading((0, start, stop))), [frame])
    padding = 2 * 64  # between the three arrays of the message
    assert 0 <= reader.read_bytes[0] - before_the_rows - blocks * BLOCK_BYTES <= padding
    assert reader.inputs == [rows.log_probs(SAMPLES[start:stop], tokens=16)]


def test_damage_in_a_block_that_is_not_needed_goes_unnoticed():
    torn = rows.damaged(in_blocks())  # in the last row
    assert RowReader(call(range(60), reading((0, 0, 60))), [torn]).inputs == [rows.log_probs(range(60), tokens=16)]
    assert RowReader(call(range(60, 64), reading((0, 60, 64))), [torn]).rows == 0


def test_bytes_read_are_reported_per_input():
    both = [codec.encode(rows.log_probs([1])), codec.encode(rows.values([1]))]
    readings = (reading((0, 0, 1)), reading((1, 0, 1), schema=Values.schema_id))
    assert RowReader(call([1], *readings), both).read_bytes == [frame.nbytes for frame in both]
    assert RowReader(call([1], *readings), [None, both[1]]).read_bytes == [0, both[1].nbytes]


# --- working


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    """Rank 2 of service "a", whose log folder is below the test's."""
    spec = specs.service("a", log_path=str(tmp_path / "logs" / "a.log"), term=4)
    with ThreadPoolExecutor(1) as thread:
        yield Rank(spec, build(spec, 2), SomeAreGone(), thread, 2)


def doubled(samples: Sequence[int]) -> LogProbs:
    batch = rows.log_probs(samples)
    return LogProbs(sample_ids=batch.sample_ids, log_probs=batch.log_probs.with_values(2 * batch.log_probs.values))


async def test_it_works_on_what_it_read_and_puts_what_came_out(rank: Rank):
    reply, payloads = await rank.call(call([1, 2], reading((0, 0, 2))), frames([1, 2]))
    assert codec.decode(payloads[0]) == doubled([1, 2])
    assert codec.open_frame(payloads[0]).header.term == 4
    (shard,) = reply.shards
    assert (shard.sample_ids, shard.nbytes) == ([1, 2], payloads[0].nbytes)
    assert reply.read_bytes == [codec.encode(rows.log_probs([1, 2])).nbytes]
    assert reply.start <= reply.end


async def test_it_works_on_the_rows_that_it_could_read(rank: Rank):
    whole, torn = frames([1, 2], [3, 4])
    asked = call([1, 2, 3, 4, 5], reading((0, 0, 2), (1, 0, 2), (2, 0, 1)))
    reply, payloads = await rank.call(asked, [whole, broken(torn), None])
    assert codec.decode(payloads[0]) == doubled([1, 2])
    (damage,) = reply.damaged
    assert (damage.input, damage.rows, reply.lost) == (0, [2, 3], [4])


async def test_without_a_row_to_work_on_it_is_not_called(rank: Rank):
    """`count` divides by the number of its rows."""
    reply, payloads = await rank.call(call([1, 2], reading((0, 0, 2)), method="count"), [None])
    assert (reply.shards, reply.metrics, payloads, reply.lost) == ([], None, [], [0, 1])


async def test_a_refused_frame_is_kept_with_its_reason(rank: Rank, tmp_path: Path):
    torn = broken(*frames([3, 4]))
    await rank.call(call([3, 4, 5], reading((0, 0, 2), (1, 0, 1))), [torn, None])
    folder = tmp_path / "logs" / "quarantine"
    assert {path.name for path in folder.iterdir()} == {f"a-2-{os.getpid()}-1.{kind}" for kind in ("frame", "txt")}
    assert (folder / f"a-2-{os.getpid()}-1.frame").read_bytes() == torn.tobytes()
    assert "a.double#1: rows 0 to 1 are damaged" in (folder / f"a-2-{os.getpid()}-1.txt").read_text()


async def test_the_quarantine_does_not_fill_the_disk(rank: Rank, tmp_path: Path):
    for _ in range(MOST_KEPT + 3):
        await rank.call(call([3], reading((0, 0, 1))), [broken(*frames([3]))])
    assert len(list((tmp_path / "logs" / "quarantine").glob("*.frame"))) == MOST_KEPT


async def test_failures_of_its_rows_are_reported(rank: Rank):
    reply, payloads = await rank.call(call([1, 2, 3], reading((0, 0, 3)), method="refuse_odd"), frames([1, 2, 3]))
    assert reply.failures == [Failure(1, "odd"), Failure(3, "odd")]
    assert codec.decode(payloads[0]) == rows.log_probs([2])


async def test_rows_that_all_failed_are_put_nowhere(rank: Rank):
    reply, payloads = await rank.call(call([1], reading((0, 0, 1)), method="refuse_odd"), frames([1]))
    assert (reply.shards, payloads, reply.failures) == ([], [], [Failure(1, "odd")])


async def test_measurements_travel_in_the_reply(rank: Rank):
    reply, payloads = await rank.call(call([1, 2], reading((0, 0, 2)), method="count"), frames([1, 2]))
    assert (reply.metrics, payloads) == (Metrics(values={"id": 1.5}, counts={"id": 2.0}), [])


METRICS = Metrics(values={"loss": 1.0})


@pytest.mark.parametrize(
    ("result", "parts"),
    [
        (rows.scores([1]), (rows.scores([1]), [], None)),
        (Partial(rows.scores([1]), [Failure(2, "x")]), (rows.scores([1]), [Failure(2, "x")], None)),
        (Measured(rows.scores([1]), METRICS), (rows.scores([1]), [], METRICS)),
        (METRICS, (None, [], METRICS)),
        (None, (None, [], None)),
    ],
    ids=["batch", "partial", "measured", "metrics", "nothing"],
)
def test_a_method_may_return_rows_failures_and_measurements(
    result: Any, parts: tuple[Scores | None, list[Failure], Metrics | None]
):
    assert unwrap(result) == parts
