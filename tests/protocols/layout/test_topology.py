"""Topologies: HybridFlow's examples, and its claim of zero redundancy in every small setting."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given

from protocols.layout.topology import Coordinates, GenerationGrouping, Style, Topology
from tests.protocols.strategies import topologies

M = 14_000_000_000  # bytes of a 7B model in bfloat16


def one_based(groups: list[list[int]]) -> list[list[int]]:
    """Ranks numbered from 1, as in the paper."""
    return [[rank + 1 for rank in group] for group in groups]


def settings(style: Style) -> list[GenerationGrouping]:
    """The 180 settings with sizes that are powers of two: p <= 4, t <= 8, d <= 3 and every divisor pair."""
    return [
        GenerationGrouping(Topology(p, t, d), pp, tp, style)
        for p, t, d in product((1, 2, 4), (1, 2, 4, 8), (1, 2, 3))
        for pp, tp in product((1, 2, 4), (1, 2, 4, 8))
        if p % pp == 0 and t % tp == 0
    ]


# --- ranks and coordinates


def test_tensor_ranks_are_neighbours_then_stages_then_replicas():
    topology = Topology(pp=2, tp=2, dp=2)
    assert [topology.coordinates(rank) for rank in range(8)] == [
        Coordinates(pp, tp, dp) for dp in range(2) for pp in range(2) for tp in range(2)
    ]
    assert Topology(pp=1, tp=4, dp=2).coordinates(5) == Coordinates(pp=0, tp=1, dp=1)


@given(topologies())
def test_coordinates_name_a_rank(topology: Topology):
    for rank in range(topology.world_size):
        assert topology.rank(topology.coordinates(rank)) == rank


@given(topologies())
def test_training_groups_tile_the_world(topology: Topology):
    sizes = {"tensor": topology.tp, "pipeline": topology.pp, "data": topology.dp}
    for axis, size in sizes.items():
        groups = getattr(topology, f"{axis}_groups")
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
        assert {len(group) for group in groups} == {size}


@given(topologies())
def test_text_is_p_t_d(topology: Topology):
    assert Topology.parse(str(topology)) == topology
    assert str(Topology(1, 4, 2)) == "1-4-2"


def test_two_sizes_are_one_replica():
    assert Topology.parse("2-4") == Topology(2, 4, 1)


@pytest.mark.parametrize("text", ["", "1", "1-2-3-4", "1-x-2", "1--2", "-1-2-2", "1-²-2"])
def test_text_that_is_no_topology_is_quoted(text: str):
    with pytest.raises(ValueError, match=f"topology {text!r}: write p-t-d"):
        Topology.parse(text)


def test_errors_carry_the_numbers():
    with pytest.raises(ValueError, match="topology 0-2-2"):
        Topology(0, 2, 2)
    with pytest.raises(ValueError, match="topology 1-0-2"):
        Topology.parse("1-0-2")
    for rank in (-1, 8):
        with pytest.raises(ValueError, match=f"rank {rank} is not among the 8 ranks of topology 1-4-2"):
            Topology(1, 4, 2).coordinates(rank)
    for place in (Coordinates(1, 0, 0), Coordinates(0, 4, 0), Coordinates(0, 0, -1)):
        with pytest.raises(ValueError, match="outside topology 1-4-2"):
            Topology(1, 4, 2).rank(place)
    with pytest.raises(ValueError, match="generation tp 3 does not divide training tp 4 of topology 1-4-2"):
        GenerationGrouping(Topology(1, 4, 2), 1, 3)
    with pytest.raises(ValueError, match="generation pp 0 does not divide training pp 1"):
        GenerationGrouping(Topology(1, 4, 2), 0, 2)
    with pytest.raises(ValueError, match="'megatron': know vanilla, hybridflow, deepspeed"):
        GenerationGrouping(Topology(1, 4, 2), 1, 2, "megatron")  # type: ignore[arg-type]


# --- the paper's examples


def peak_bytes(grouping: GenerationGrouping, m: int) -> Fraction:
    """Most parameter bytes that a rank holds during the transition: all m unless gathered shard by shard."""
    if grouping.style != "hybridflow":
        return Fraction(m)
    return grouping._needed(m) + redundant_bytes(grouping, m)


def redundant_bytes(grouping: GenerationGrouping, m: int) -> Fraction:
    """Most training bytes that a rank keeps while generating without using them for generation.

    deepspeed's flat ZeRO shards are never used in place: m/(tpd). Otherwise it is m/(tp) if some rank's training
    shard lies outside its generation shard, and 0 if the shards nest on every rank.
    """
    if grouping.style == "deepspeed":
        return grouping._owned(m)
    return max(grouping._owned(m) - grouping._kept(rank, m) for rank in range(grouping.topology.world_size))


def test_1_4_2_to_1_2_2_2():
    topology = Topology(1, 4, 2)
    assert one_based(topology.tensor_groups) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert one_based(topology.data_groups) == [[1, 5], [2, 6], [3, 7], [4, 8]]

    vanilla = GenerationGrouping(topology, pp=1, tp=2, style="vanilla")
    assert one_based(vanilla.tensor_groups) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert one_based(vanilla.micro_dp_groups) == [[1, 3], [2, 4], [5, 7], [6, 8]]
    assert redundant_bytes(vanilla, M) == Fraction(M, 4)

    hybrid = GenerationGrouping(topology, pp=1, tp=2, style="hybridflow")
    assert one_based(hybrid.tensor_groups) == [[1, 3], [2, 4], [5, 7], [6, 8]]
    assert one_based(hybrid.micro_dp_groups) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert redundant_bytes(hybrid, M) == 0


def test_1_2_2_to_1_1_2_2():
    topology = Topology(1, 2, 2)
    assert one_based(topology.tensor_groups) == [[1, 2], [3, 4]]
    assert one_based(topology.data_groups) == [[1, 3], [2, 4]]
    hybrid = GenerationGrouping(topology)
    assert one_based(hybrid.tensor_groups) == [[1], [2], [3], [4]]
    assert one_based(hybrid.micro_dp_groups) == [[1, 2], [3, 4]]


def test_2_4_1_to_1_2_4_1():
    hybrid = GenerationGrouping(Topology(2, 4, 1), pp=1, tp=2)
    assert one_based(hybrid.tensor_groups) == [[1, 3], [2, 4], [5, 7], [6, 8]]
    assert one_based(hybrid.pipeline_groups) == [[1], [2], [3], [4], [5], [6], [7], [8]]
    assert one_based(hybrid.micro_dp_groups) == [[1, 2, 5, 6], [3, 4, 7, 8]]
    assert [hybrid.coordinates(rank).micro_dp for rank in range(8)] == [0, 1, 0, 1, 2, 3, 2, 3]


def test_the_table_of_transition_costs():
    """1-8-2 to t_g = 2: with these 16 ranks all rows of the paper's table differ."""
    deepspeed, vanilla, hybrid = (
        GenerationGrouping(Topology(1, 8, 2), 1, 2, style) for style in ("deepspeed", "vanilla", "hybridflow")
    )
    assert [g.received_bytes(M) for g in (deepspeed, vanilla, hybrid)] == [
        Fraction(15 * M, 16),
        Fraction(7 * M, 8),
        Fraction(3 * M, 8),
    ]
    assert [peak_bytes(g, M) for g in (deepspeed, vanilla, hybrid)] == [M, M, Fraction(M, 2)]
    assert [redundant_bytes(g, M) for g in (deepspeed, vanilla, hybrid)] == [Fraction(M, 16), Fraction(M, 8), 0]


def test_figures_are_exact():
    hybrid = GenerationGrouping(Topology(3, 1, 1))
    assert hybrid.received_bytes(10) == Fraction(20, 3)
    assert isinstance(redundant_bytes(hybrid, 10), Fraction)


# --- all settings


def test_there_are_180_settings():
    assert len(settings("hybridflow")) == 180


@pytest.mark.parametrize("style", ["vanilla", "hybridflow", "deepspeed"])
def test_every_grouping_tiles_the_world(style: Style):
    for grouping in settings(style):
        ranks = list(range(grouping.topology.world_size))
        sizes = {"tensor": grouping.tp, "pipeline": grouping.pp, "micro_dp": grouping.micro_dp}
        assert len({grouping.coordinates(rank) for rank in ranks}) == len(ranks)
        for axis, size in sizes.items():
            groups = getattr(grouping, f"{axis}_groups")
            assert sorted(rank for group in groups for rank in group) == ranks
            assert {len(group) for group in groups} == {size}
            assert groups == sorted(sorted(group) for group in groups)


def test_hybridflow_is_never_redundant_and_receives_the_lower_bound():
    for grouping in settings("hybridflow"):
        needed = Fraction(M, grouping.pp * grouping.tp)
        assert redundant_bytes(grouping, M) == 0
        assert peak_bytes(grouping, M) == needed
        assert grouping.received_bytes(M) == needed - Fraction(M, grouping.topology.replica_size)


def test_vanilla_wastes_memory_in_93():
    redundant = [g for g in settings("vanilla") if redundant_bytes(g, M)]
    assert len(redundant) == 93
    assert all(redundant_bytes(g, M) == Fraction(M, g.topology.replica_size) for g in redundant)


@given(topologies(max_pp=6, max_tp=6))
def test_no_size_needs_to_be_a_power_of_two(topology: Topology):
    for pp, tp in product(range(1, topology.pp + 1), range(1, topology.tp + 1)):
        if topology.pp % pp == 0 and topology.tp % tp == 0:
            assert redundant_bytes(GenerationGrouping(topology, pp, tp), M) == 0
