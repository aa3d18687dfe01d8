"""Row plans: between any two topologies, each destination rank reads exactly its rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.data.columns import Batch, concat, empty, take
from protocols.data.jagged import Jagged
from protocols.data.messages import LogProbs, Prompts, Rollouts, Scores
from protocols.data.partition import Rows
from protocols.layout.row_plan import Located, Segment
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocol, register
from tests.protocols.strategies import batches, topologies

CUTTING = ["3D_PROTO", "3D_ALL_MICRO_DP", "DP_PROTO", "METRIC"]
READING = [*CUTTING, "ONE_TO_ALL", "3D_PP_ONLY", "RANK_ZERO"]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def generations(max_pp: int, max_tp: int, max_dp: int) -> Iterator[GenerationGrouping]:
    """Every topology up to these sizes, with every generation layout that divides it."""
    for sizes in product(range(1, max_pp + 1), range(1, max_tp + 1), range(1, max_dp + 1)):
        topology = Topology(*sizes)
        for pp, tp in product(divisors(topology.pp), divisors(topology.tp)):
            yield GenerationGrouping(topology, pp, tp, "hybridflow")
            yield GenerationGrouping(topology, pp, tp, "vanilla")


def plan_of(name: str, rows: int, generation: GenerationGrouping) -> list[Rows]:
    return protocol(name).distribute(rows, generation.topology, generation=generation)


def shard_sizes(name: str, rows: int, generation: GenerationGrouping) -> list[int]:
    """The number of rows in each shard of a producing service, in the order of collected ranks."""
    plan = plan_of(name, rows, generation)
    return [len(plan[rank]) for rank in protocol(name).collect(generation.topology, generation=generation)]


def produce(batch: Batch, name: str, generation: GenerationGrouping) -> list[Batch]:
    """The shards of a batch that a service of this topology holds after computing it."""
    plan = plan_of(name, len(batch), generation)
    return [take(batch, plan[rank]) for rank in protocol(name).collect(generation.topology, generation=generation)]


def in_shards(sizes: Sequence[int]) -> Located:
    """The rows of all shards in the order of `collect`; a shard may be empty."""
    rows = [np.arange(size) for size in sizes]
    return Located(np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(0), *rows]))


def reading_plan(located: Located, plan: Sequence[Rows]) -> list[list[Segment]]:
    """What each destination rank reads; `distribute` gives one index array per rank."""
    return [located.segments(rows) for rows in plan]


def read(shards: Sequence[Batch], segments: Sequence[Segment]) -> Batch:
    """The rows that a rank holds after reading its segments."""
    parts = [take(shards[at.source], np.arange(at.start, at.stop)) for at in segments]
    return concat(parts) if parts else empty(type(shards[0]))


# --- examples


def test_rows_of_shards_lie_one_after_the_other():
    located = in_shards([2, 0, 3])
    assert len(located) == 5
    assert located.sources.tolist() == [0, 0, 2, 2, 2]
    assert located.rows.tolist() == [0, 1, 0, 1, 2]
    assert len(in_shards([])) == 0


def test_neighbours_of_one_shard_merge():
    located = in_shards([4, 4])
    assert located.segments([0, 1, 2]) == [Segment(0, 0, 3)]
    assert located.segments([2, 3, 4, 5]) == [Segment(0, 2, 4), Segment(1, 0, 2)]
    assert located.segments([3, 7]) == [Segment(0, 3, 4), Segment(1, 3, 4)]  # row 3 of both: no neighbours
    assert located.segments([]) == []


def test_segments_keep_the_order_that_is_asked_for():
    located = in_shards([4, 4])
    assert located.segments([4, 5, 0, 1]) == [Segment(1, 0, 2), Segment(0, 0, 2)]
    assert located.segments([2, 1, 1]) == [Segment(0, 2, 3), Segment(0, 1, 2), Segment(0, 1, 2)]


def test_rows_may_lie_anywhere():
    """After a join by id, adjacent rows of the batch need not be adjacent in a shard."""
    located = Located(sources=np.array([5, 5, 2, 5]), rows=np.array([7, 8, 9, 9]))
    assert located.segments([0, 1, 3]) == [Segment(5, 7, 10)]
    assert located.segments(range(4)) == [Segment(5, 7, 9), Segment(2, 9, 10), Segment(5, 9, 10)]


def test_a_replica_of_four_is_read_by_a_replica_of_three():
    """10 rows in shards of 3, 3, 2 and 2 are read in parts of 4, 3 and 3."""
    sizes = shard_sizes("3D_PROTO", 10, GenerationGrouping(Topology(dp=4)))
    plan = protocol("3D_PROTO").distribute(10, Topology(dp=3))
    assert reading_plan(in_shards(sizes), plan) == [
        [Segment(0, 0, 3), Segment(1, 0, 1)],
        [Segment(1, 1, 3), Segment(2, 0, 1)],
        [Segment(2, 1, 2), Segment(3, 0, 2)],
    ]


def test_a_rank_without_rows_reads_nothing():
    plan = protocol("RANK_ZERO").distribute(3, Topology(dp=2))
    assert reading_plan(in_shards([1, 2]), plan) == [[Segment(0, 0, 1), Segment(1, 0, 2)], []]


def test_segments_travel_as_three_numbers():
    frame = msgspec.msgpack.encode([Segment(1, 20, 30)])
    assert msgspec.msgpack.decode(frame) == [[1, 20, 30]]
    assert msgspec.msgpack.decode(frame, type=list[Segment]) == [Segment(1, 20, 30)]
    assert len(Segment(1, 20, 30)) == 10


def test_located_rows_compare_by_place():
    assert in_shards([1, 2]) == Located(np.array([0, 1, 1]), np.array([0, 0, 1]))
    assert in_shards([1, 2]) != in_shards([2, 1])


# --- every pair of topologies with p <= 4, t <= 8, d <= 4, generations included


@pytest.mark.parametrize("rows", [0, 3, 131])
def test_whatever_the_two_topologies_every_rank_reads_its_rows_once(rows: int):
    """Reading depends only on the sizes of the source's shards and on one part of the plan at a time.

    So these pairs of sizes and parts cover every pair of topologies and protocols.
    """
    every = list(generations(4, 8, 4))
    sizes_seen = {tuple(shard_sizes(name, rows, source)) for source in every for name in CUTTING}
    parts = {
        (*part[:1].tolist(), len(part)): part for to in every for name in READING for part in plan_of(name, rows, to)
    }
    for sizes in sizes_seen:
        located = in_shards(sizes)
        starts = np.cumsum(sizes) - sizes
        for part, segments in zip(parts.values(), reading_plan(located, list(parts.values())), strict=True):
            got = [row for at in segments for row in range(starts[at.source] + at.start, starts[at.source] + at.stop)]
            assert got == part.tolist()
            sources = [at.source for at in segments]  # no two reads of one shard, and no empty read
            assert sources == sorted(set(sources))
            assert all(0 <= at.start < at.stop <= sizes[at.source] for at in segments)


def ragged(rows: int) -> LogProbs:
    """Rows of 0, 1, 2, 3, 0, ... values, all values different."""
    lengths = np.arange(rows) % 4
    values = np.arange(lengths.sum(), dtype=np.float32)
    return LogProbs(sample_ids=np.arange(rows) * 7, log_probs=Jagged.from_lengths(values, lengths))


@pytest.mark.parametrize("name", CUTTING)
def test_a_ragged_batch_goes_through_every_pair_of_small_topologies(name: str):
    every = list(generations(2, 2, 3))
    batch = ragged(7)
    for source in every:
        shards = produce(batch, name, source)
        located = in_shards([len(shard) for shard in shards])
        for destination in every[:: 1 if name == "3D_ALL_MICRO_DP" else 2]:  # the two styles differ only there
            plan = plan_of(name, len(batch), destination)
            held = [read(shards, segments) for segments in reading_plan(located, plan)]
            sources = protocol(name).collect(destination.topology, generation=destination)
            assert concat([held[rank] for rank in sources]) == batch, (source, destination)


# --- random pairs, real messages


@st.composite
def groupings(draw: st.DrawFn) -> GenerationGrouping:
    topology = draw(topologies(max_pp=4, max_tp=8, max_dp=4))
    pp, tp = (draw(st.sampled_from(divisors(size))) for size in (topology.pp, topology.tp))
    return GenerationGrouping(topology, pp, tp, draw(st.sampled_from(["hybridflow", "vanilla"])))


messages = st.sampled_from([Prompts, Rollouts, LogProbs, Scores]).flatmap(lambda kind: batches(kind, max_rows=9))


@settings(max_examples=60)
@given(messages, groupings(), groupings(), st.sampled_from(CUTTING), st.sampled_from(READING))
def test_a_message_crosses_any_two_topologies(
    batch: Batch, source: GenerationGrouping, destination: GenerationGrouping, produced: str, consumed: str
):
    shards = produce(batch, produced, source)
    assert concat(shards) == batch
    plan = plan_of(consumed, len(batch), destination)
    segments = reading_plan(in_shards([len(shard) for shard in shards]), plan)
    for rows, reads in zip(plan, segments, strict=True):
        assert sum(map(len, reads)) == len(rows)
        assert read(shards, reads) == take(batch, rows)


@given(st.lists(st.integers(0, 6), max_size=6).filter(any), st.data())
def test_any_rows_in_any_order_are_read_as_asked(sizes: list[int], data: st.DataObject):
    index = data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=20))
    batch, starts = ragged(sum(sizes)), np.cumsum(sizes) - sizes
    shards = [take(batch, np.arange(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    segments = in_shards(sizes).segments(index)
    assert read(shards, segments) == take(batch, index)
    for before, after in pairwise(segments):
        assert (before.source, before.stop) != (after.source, after.start), "two reads that could be one"


def test_a_plan_of_your_own_needs_no_contiguous_rows():
    def round_robin(rows: int, topology: Topology, **_: object) -> list[Rows]:
        return [np.arange(rank, rows, topology.world_size) for rank in range(topology.world_size)]

    own = register("test:dealt", round_robin, lambda topology, **_: range(topology.world_size))
    batch = ragged(11)
    shards = produce(batch, "3D_PROTO", GenerationGrouping(Topology(dp=3)))
    plan = own.distribute(11, Topology(1, 2, 2))
    held = [read(shards, at) for at in reading_plan(in_shards([len(shard) for shard in shards]), plan)]
    assert held == [take(batch, np.arange(rank, 11, 4)) for rank in range(4)]


# --- errors


@pytest.mark.parametrize(
    ("sources", "rows", "reason"),
    [
        ([0, 0], [0], "2 sources for 1 rows"),
        ([0.0], [0], r"located sources: want int64 \[rows\], got float64 \[1\]"),
        ([0], [[0]], r"located rows: want int64 \[rows\], got int64 \[1, 1\]"),
        ([0, 0], [0, -4], "located rows: -4 at row 1"),
        ([-1], [0], "located sources: -1 at row 0"),
    ],
)
def test_places_that_are_none_are_refused(sources: list, rows: list, reason: str):
    with pytest.raises(ValueError, match=reason):
        Located(np.array(sources), np.array(rows))


def test_an_index_that_fits_no_row_is_refused():
    located = in_shards([2, 2])
    for index in ([4], [-1, 0]):
        with pytest.raises(IndexError, match="are wanted of 4 located ones"):
            located.segments(index)
    for index in ([True, False], [0.0], [[0]]):
        with pytest.raises(ValueError, match="want flat row indices"):
            located.segments(index)
