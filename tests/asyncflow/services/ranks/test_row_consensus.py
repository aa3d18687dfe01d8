"""Ranks that share a model agree on the rows that all of them can read, and report the others alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.services.channels.endpoint import Frame
from asyncflow.services.ranks.row_consensus import exchange_unreadable_rows
from asyncflow.services.ranks.row_reader import RowReader
from protocols.control.delivery import RankCall, Reading
from protocols.data import codec
from protocols.data.messages import LogProbs
from protocols.layout.row_plan import Segment
from tests.asyncflow.services import rows

SAMPLES = [4, 2, 3, 6]


class AllGather:
    """An all-gather of bytes between ranks that run in one thread each."""

    def __init__(self, size: int) -> None:
        self._messages: list[bytes] = [b""] * size
        self._barrier = Barrier(size)

    def of_rank(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def exchange(message: bytes) -> list[bytes]:
            self._messages[rank] = message
            self._barrier.wait(10)
            return list(self._messages)

        return exchange


def call(samples: Sequence[int] = SAMPLES) -> RankCall:
    """A call whose rows come in one frame each."""
    return RankCall(
        "a.double#1",
        "double",
        list(samples),
        [Reading(LogProbs.schema_id, [Segment(source, 0, 1) for source in range(len(samples))])],
    )


def frames(samples: Sequence[int], damaged: Sequence[int] = (), lost: Sequence[int] = ()) -> list[Frame | None]:
    made: list[Frame | None] = []
    for sample in samples:
        frame = codec.encode(rows.log_probs([sample]))
        made.append(None if sample in lost else rows.damaged(frame) if sample in damaged else frame)
    return made


def agreed(*ranks: tuple[RankCall, list[Frame | None]]) -> list[RowReader]:
    """Each rank's reader after the exchange."""
    gather = AllGather(len(ranks))

    def read(rank: int) -> RowReader:
        asked, given = ranks[rank]
        reader = RowReader(asked, given)
        exchange_unreadable_rows(asked, reader, gather.of_rank(rank))
        return reader

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(read, range(len(ranks))))


def accounts(reader: RowReader) -> tuple[list[int], list[int], list[int]]:
    """The samples that are kept, failed and lost."""
    samples = reader.inputs[0].sample_ids.tolist()
    failed = sorted(SAMPLES[row] for damage in reader.damaged for row in damage.rows)
    return samples, failed, sorted(SAMPLES[row] for row in reader.lost)


def test_where_all_can_read_all_nothing_changes():
    first, second = agreed((call(), frames(SAMPLES)), (call(), frames(SAMPLES)))
    assert first.inputs == second.inputs == [rows.log_probs(SAMPLES)]
    assert accounts(first) == (SAMPLES, [], [])


def test_a_row_that_one_rank_can_not_read_is_left_out_by_its_peers_with_the_same_cause():
    torn, whole = agreed((call(), frames(SAMPLES, damaged=[3])), (call(), frames(SAMPLES)))
    assert accounts(torn) == accounts(whole) == ([4, 2, 6], [3], [])
    assert torn.damaged == whole.damaged
    assert "its frame was refused" in whole.damaged[0].cause
    assert whole.inputs == [rows.log_probs([4, 2, 6])]


def test_a_row_whose_bytes_are_gone_for_one_is_lost_to_all_and_can_be_sent_again():
    gone, there = agreed((call(), frames(SAMPLES, lost=[4])), (call(), frames(SAMPLES)))
    assert accounts(gone) == accounts(there) == ([2, 3, 6], [], [4])


def test_what_another_replica_can_not_read_costs_this_one_nothing():
    other, own = agreed((call([8, 9]), frames([8, 9], damaged=[8])), (call(), frames(SAMPLES)))
    assert other.inputs == [rows.log_probs([9])]
    assert accounts(own) == (SAMPLES, [], [])


def test_a_rank_without_rows_goes_on_with_an_empty_batch():
    empty, own = agreed((call([]), []), (call(), frames(SAMPLES, lost=SAMPLES)))
    for reader in (empty, own):
        assert reader.rows == 0
        assert [type(batch) for batch in reader.inputs] == [LogProbs]
        assert len(reader.inputs[0]) == 0


@given(
    damaged=st.lists(st.sets(st.sampled_from(SAMPLES)), min_size=3, max_size=3),
    lost=st.lists(st.sets(st.sampled_from(SAMPLES)), min_size=3, max_size=3),
)
def test_peers_always_end_with_the_same_rows_each_accounted_for_once(damaged: list[set[int]], lost: list[set[int]]):
    readers = agreed(*((call(), frames(SAMPLES, list(d), list(g))) for d, g in zip(damaged, lost, strict=True)))
    unread = set().union(*damaged, *lost)
    for reader in readers:
        left, failed, gone = accounts(reader)
        assert left == [sample for sample in SAMPLES if sample not in unread]
        assert sorted([*left, *failed, *gone]) == sorted(SAMPLES)
        assert np.array_equal(reader.inputs[0].sample_ids, np.array(left, np.int64))
