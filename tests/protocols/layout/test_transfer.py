"""Transfer protocols: every rank reads its own rows, and collected rows have the order of the sent ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.messages import Metrics
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocol, protocols, register
from tests.protocols.strategies import topologies

BUILT_IN = [
    "3D_ALL_MICRO_DP",
    "3D_PP_ONLY",
    "3D_PROTO",
    "ALL_TO_ALL",
    "DP_PROTO",
    "METRIC",
    "ONE_TO_ALL",
    "RANK_ZERO",
]
CUTTING = ["3D_PROTO", "3D_ALL_MICRO_DP", "DP_PROTO", "METRIC"]
rows_counts = st.integers(0, 40)


@st.composite
def groupings(draw: st.DrawFn) -> GenerationGrouping:
    topology = draw(topologies(max_pp=4, max_tp=4))
    pp = draw(st.sampled_from([n for n in (1, 2, 3, 4) if topology.pp % n == 0]))
    tp = draw(st.sampled_from([n for n in (1, 2, 3, 4) if topology.tp % n == 0]))
    return GenerationGrouping(topology, pp, tp, draw(st.sampled_from(["hybridflow", "vanilla"])))


def plan_of(name: str, rows: int, topology: Topology, **options) -> list[list[int]]:
    return [part.tolist() for part in protocol(name).distribute(rows, topology, **options)]


def sizes_of(name: str, rows: int, topology: Topology) -> list[int]:
    return [len(part) for part in plan_of(name, rows, topology)]


# --- an example of each protocol


def test_one_to_all_gives_everything_to_all():
    topology = Topology(1, 2, 1)
    assert plan_of("ONE_TO_ALL", 3, topology) == [[0, 1, 2]] * 2
    assert protocol("ONE_TO_ALL").collect(topology) == [0, 1]


def test_3d_proto_cuts_by_replica_and_broadcasts_inside():
    topology = Topology(pp=2, tp=2, dp=2)
    first, second = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
    assert plan_of("3D_PROTO", 10, topology) == [first] * 4 + [second] * 4
    assert protocol("3D_PROTO").collect(topology) == [2, 6]  # last stage, tensor index 0


def test_micro_dp_cuts_a_replica_again():
    topology = Topology(1, 2, 2)
    grouping = GenerationGrouping(topology, pp=1, tp=1)
    plan = plan_of("3D_ALL_MICRO_DP", 10, topology, generation=grouping)
    assert plan == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    assert protocol("3D_ALL_MICRO_DP").collect(topology, generation=grouping) == [0, 1, 2, 3]


def test_micro_dp_broadcasts_to_the_ranks_that_generate_together():
    topology = Topology(1, 4, 1)
    grouping = GenerationGrouping(topology, pp=1, tp=2)  # ranks 0, 2 and 1, 3
    plan = plan_of("3D_ALL_MICRO_DP", 4, topology, generation=grouping)
    assert plan == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert protocol("3D_ALL_MICRO_DP").collect(topology, generation=grouping) == [0, 1]


def test_micro_dp_collects_from_the_last_generation_stage():
    topology = Topology(2, 2, 1)
    grouping = GenerationGrouping(topology, pp=2, tp=1)  # stages on ranks 0, 2 and 1, 3
    assert protocol("3D_ALL_MICRO_DP").collect(topology, generation=grouping) == [2, 3]


def test_3d_pp_only_collects_one_rank_a_stage():
    topology = Topology(3, 2, 2)
    assert plan_of("3D_PP_ONLY", 2, topology) == [[0, 1]] * 12
    assert protocol("3D_PP_ONLY").collect(topology) == [0, 2, 4]


def test_dp_proto_takes_every_rank_for_a_replica():
    topology = Topology(1, 2, 2)
    assert plan_of("DP_PROTO", 6, topology) == [[0, 1], [2, 3], [4], [5]]
    assert protocol("DP_PROTO").collect(topology) == [0, 1, 2, 3]


def test_all_to_all_is_one_row_a_rank():
    topology = Topology(1, 2, 2)
    assert plan_of("ALL_TO_ALL", 4, topology) == [[0], [1], [2], [3]]
    assert protocol("ALL_TO_ALL").collect(topology) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 rows for 4 ranks"):
        plan_of("ALL_TO_ALL", 5, topology)


def test_rank_zero_gives_the_others_empty_plans():
    topology = Topology(1, 2, 2)
    assert plan_of("RANK_ZERO", 3, topology) == [[0, 1, 2], [], [], []]
    assert protocol("RANK_ZERO").collect(topology) == [0]


def test_metric_is_cut_like_3d_proto():
    topology = Topology(2, 2, 2)
    assert plan_of("METRIC", 5, topology) == plan_of("3D_PROTO", 5, topology)
    assert protocol("METRIC").collect(topology) == protocol("3D_PROTO").collect(topology)


# --- every topology with p <= 4, t <= 8, d <= 4; every generation that divides it

TOPOLOGIES = [Topology(*sizes) for sizes in product(range(1, 5), range(1, 9), range(1, 5))]
ROWS = (0, 3, 50, 131)  # none, fewer than ranks, indivisible, more than the largest number of ranks


def generations() -> Iterator[GenerationGrouping]:
    for topology in TOPOLOGIES:
        for pp, tp in product(range(1, topology.pp + 1), range(1, topology.tp + 1)):
            if topology.pp % pp == 0 and topology.tp % tp == 0:
                yield GenerationGrouping(topology, pp, tp, "hybridflow")
                yield GenerationGrouping(topology, pp, tp, "vanilla")


def split(rows: range, parts: int) -> list[range]:
    """The paper's split: contiguous chunks whose sizes differ by at most one, the larger ones first."""
    size, longer = divmod(len(rows), parts)
    return [rows[i * size + min(i, longer) : (i + 1) * size + min(i + 1, longer)] for i in range(parts)]


def micro_index(rank: int, grouping: GenerationGrouping) -> int:
    """The micro-DP index of a rank, from the definition of each grouping."""
    p, t = grouping.topology.pp, grouping.topology.tp
    p_r, t_r = rank // t % p, rank % t
    if grouping.style == "vanilla":
        return (p_r * t + t_r) // (grouping.pp * grouping.tp)
    a, b = t // grouping.tp, p // grouping.pp
    return p_r % b * a + t_r % a


def ranges(plan: list[np.ndarray]) -> list[range]:
    """A plan of contiguous parts as ranges; all empty ones are equal."""
    for part in plan:
        assert np.array_equal(part, np.arange(len(part)) + part[:1].sum())
    return [range(int(part[0]), int(part[-1]) + 1) if len(part) else range(0) for part in plan]


def collected(name: str, plan: list[range], topology: Topology, **options) -> list[int]:
    return [row for rank in protocol(name).collect(topology, **options) for row in plan[rank]]


@pytest.mark.parametrize("rows", ROWS)
def test_every_rank_of_every_topology_gets_exactly_its_share(rows: int):
    x = range(rows)
    for topology in TOPOLOGIES:
        ranks, replica = range(topology.world_size), topology.pp * topology.tp
        shares = {
            "ONE_TO_ALL": [x for _ in ranks],
            "3D_PROTO": [split(x, topology.dp)[rank // replica] for rank in ranks],
            "3D_PP_ONLY": [x for _ in ranks],
            "DP_PROTO": split(x, len(ranks)),
            "RANK_ZERO": [x if rank == 0 else range(0) for rank in ranks],
            "METRIC": [split(x, topology.dp)[rank // replica] for rank in ranks],
        }
        for name, share in shares.items():
            assert ranges(protocol(name).distribute(rows, topology)) == share, (name, topology)


@pytest.mark.parametrize("rows", ROWS)
def test_what_every_topology_collects_is_what_was_distributed(rows: int):
    for topology in TOPOLOGIES:
        for name in ("3D_PROTO", "DP_PROTO", "METRIC", "RANK_ZERO"):
            plan = ranges(protocol(name).distribute(rows, topology))
            assert collected(name, plan, topology) == list(range(rows)), (name, topology)
        for name in ("ONE_TO_ALL", "3D_PP_ONLY"):  # a list of outputs, each of all rows
            plan = ranges(protocol(name).distribute(rows, topology))
            sources = protocol(name).collect(topology)
            assert [plan[rank] for rank in sources] == [range(rows)] * len(sources), (name, topology)


def test_all_to_all_of_every_topology_is_its_own_inverse():
    for topology in TOPOLOGIES:
        plan = ranges(protocol("ALL_TO_ALL").distribute(topology.world_size, topology))
        assert plan == [range(rank, rank + 1) for rank in range(topology.world_size)]
        assert collected("ALL_TO_ALL", plan, topology) == list(range(topology.world_size))


@pytest.mark.parametrize("rows", ROWS)
def test_every_generation_splits_the_split_of_its_replica(rows: int):
    """3D_ALL_MICRO_DP is split(split(x, d)[d_r], d_g)[m_r], and collecting it gives x."""
    for grouping in generations():
        topology = grouping.topology
        plan = ranges(protocol("3D_ALL_MICRO_DP").distribute(rows, topology, generation=grouping))
        parts = [split(replica, grouping.micro_dp) for replica in split(range(rows), topology.dp)]
        for rank, part in enumerate(plan):
            assert part == parts[rank // topology.replica_size][micro_index(rank, grouping)], (grouping, rank)
        assert collected("3D_ALL_MICRO_DP", plan, topology, generation=grouping) == list(range(rows)), grouping


def test_ranks_that_generate_together_read_the_same_rows():
    for grouping in generations():
        plan = ranges(protocol("3D_ALL_MICRO_DP").distribute(50, grouping.topology, generation=grouping))
        for together in [*grouping.tensor_groups, *grouping.pipeline_groups]:
            assert len({plan[rank] for rank in together}) == 1, grouping


# --- properties of all protocols


@given(groupings(), rows_counts)
def test_micro_dp_tiles_what_training_holds(grouping: GenerationGrouping, rows: int):
    topology = grouping.topology
    training = plan_of("3D_PROTO", rows, topology)
    generating = plan_of("3D_ALL_MICRO_DP", rows, topology, generation=grouping)
    leads = protocol("3D_ALL_MICRO_DP").collect(topology, generation=grouping)
    for replica in range(topology.dp):
        own = leads[replica * grouping.micro_dp : (replica + 1) * grouping.micro_dp]
        assert [row for rank in own for row in generating[rank]] == training[replica * topology.replica_size]


@given(topologies(), rows_counts)
def test_parts_differ_by_at_most_one_row(topology: Topology, rows: int):
    for name in ("3D_PROTO", "DP_PROTO"):
        sizes = sizes_of(name, rows, topology)
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@given(groupings(), rows_counts)
def test_every_plan_is_int64_one_array_a_rank(grouping: GenerationGrouping, rows: int):
    for name in BUILT_IN:
        topology = grouping.topology
        count = topology.world_size if name == "ALL_TO_ALL" else rows
        plan = protocol(name).distribute(count, topology, generation=grouping)
        assert len(plan) == topology.world_size
        assert {part.dtype for part in plan} == {np.dtype(np.int64)}


# --- groups and lengths


@given(groupings(), st.lists(st.integers(1, 6), max_size=12), st.booleans(), st.randoms(use_true_random=False))
def test_a_group_is_never_cut(grouping: GenerationGrouping, group_sizes: list[int], weighted: bool, random):
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    lengths = [random.randrange(50) for _ in groups] if weighted else None
    for name in CUTTING:
        plan = plan_of(name, len(groups), grouping.topology, generation=grouping, groups=groups, lengths=lengths)
        sources = protocol(name).collect(grouping.topology, generation=grouping)
        assert [row for rank in sources for row in plan[rank]] == list(range(len(groups)))
        places = [group for rank in sources for group in {int(groups[row]) for row in plan[rank]}]
        assert sorted(places) == list(range(len(group_sizes)))


def test_lengths_move_the_cut():
    assert plan_of("DP_PROTO", 5, Topology(dp=2), lengths=[8, 1, 1, 3, 3]) == [[0], [1, 2, 3, 4]]


def test_groups_move_the_cut():
    assert plan_of("DP_PROTO", 5, Topology(dp=2), groups=[7, 7, 7, 7, 8]) == [[0, 1, 2, 3], [4]]
    assert plan_of("DP_PROTO", 3, Topology(dp=2), groups=[1, 1, 1]) in ([[0, 1, 2], []], [[], [0, 1, 2]])


@given(topologies(), rows_counts, st.integers(1, 9))
def test_equal_lengths_cut_like_rows(topology: Topology, rows: int, length: int):
    sizes = [len(part) for part in plan_of("3D_PROTO", rows, topology, lengths=[length] * rows)]
    assert max(sizes) - min(sizes) <= 1


# --- errors


def test_arguments_that_do_not_fit_are_refused():
    topology = Topology(dp=2)
    cases = [
        ({"rows": -1}, "can't distribute -1 rows"),
        ({"rows": 3, "groups": [1, 2]}, r"groups as one integer a row, \[3\], got int64 \[2\]"),
        ({"rows": 2, "lengths": [1.5, 2.0]}, r"lengths as one integer a row, \[2\], got float64"),
        ({"rows": 2, "lengths": [4, -2]}, "lengths holds -2 at row 1"),
        ({"rows": 2, "generation": GenerationGrouping(Topology(dp=3))}, "is for topology 1-1-3, .* have 1-1-2"),
    ]
    for options, reason in cases:
        with pytest.raises(ValueError, match=f"3D_PROTO: .*{reason}"):
            protocol("3D_PROTO").distribute(topology=topology, **options)


def test_micro_dp_needs_the_grouping():
    for call in (lambda p: p.distribute(4, Topology()), lambda p: p.collect(Topology())):
        with pytest.raises(ValueError, match="pass generation=GenerationGrouping"):
            call(protocol("3D_ALL_MICRO_DP"))


# --- the registry


def test_all_eight_are_there():
    assert set(BUILT_IN) <= set(protocols())


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(LookupError, match=r"'4D_PROTO'; there are 3D_ALL_MICRO_DP, .*RANK_ZERO"):
        protocol("4D_PROTO")


def test_a_protocol_of_your_own_is_a_pair_of_functions_and_a_name():
    def round_robin(rows, topology, **_):
        return [np.arange(rank, rows, topology.world_size) for rank in range(topology.world_size)]

    def backwards(topology, **_):
        return list(range(topology.world_size))[::-1]

    register("test:round-robin", round_robin, backwards)
    assert plan_of("test:round-robin", 5, Topology(dp=2)) == [[0, 2, 4], [1, 3]]
    assert protocol("test:round-robin").collect(Topology(dp=2)) == [1, 0]
    with pytest.raises(ValueError, match="exists already"):
        register("test:round-robin", round_robin, backwards)


def test_a_protocol_of_your_own_is_held_to_the_contract():
    plans: dict[str, tuple[Any, str]] = {
        "test:few": ([[0]], "planned 1 parts for the 2 ranks"),
        "test:far": ([[0], [7]], "rank 1 reads rows 7 to 7 of 2"),
        "test:negative": ([[-1], []], "rank 0 reads rows -1 to -1 of 2"),
        "test:mask": ([[True, False], []], "rank 0 wants flat row indices, got bool"),
    }
    for name, (plan, reason) in plans.items():
        register(name, partial(lambda plan, rows, topology, **_: plan, plan), lambda topology, **_: [2])
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            plan_of(name, 2, Topology(dp=2))
        with pytest.raises(ValueError, match="collects from rank 2"):
            protocol(name).collect(Topology(dp=2))


def test_ranks_of_a_protocol_of_your_own_are_held_to_the_contract():
    register("test:twice", lambda rows, topology, **_: [], lambda topology, **_: [1, 0, 1])
    with pytest.raises(ValueError, match="test:twice: collects from rank 1 twice"):
        protocol("test:twice").collect(Topology(dp=2))
    register("test:generator", lambda rows, topology, **_: [], lambda topology, **_: iter((1, 0)))
    assert protocol("test:generator").collect(Topology(dp=2)) == [1, 0]


# --- metrics


def test_metrics_reduce_by_their_counts():
    reduce = protocol("METRIC").reduce
    assert reduce([1.0, 3.0], [1, 3]) == 2.5


def test_a_replica_that_measured_nothing_takes_no_part():
    reduce = protocol("METRIC").reduce
    assert reduce([2.0, float("nan")], [5, 0]) == 2.0
    assert reduce([float("nan")], [0]) == 0.0
    assert reduce([], []) == 0.0


def test_counts_that_do_not_fit_are_refused():
    for values, counts in [([1.0], [1, 2]), ([1.0], [-1]), (1.0, 1)]:
        with pytest.raises(ValueError, match="one value and one count >= 0 a replica"):
            protocol("METRIC").reduce(values, counts)


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), max_size=4))
def test_a_mean_of_replicas_is_the_mean_of_their_rows(replicas: list[list[float]]):
    means = [sum(rows) / len(rows) if rows else float("nan") for rows in replicas]
    rows = [value for replica in replicas for value in replica]
    reduced = protocol("METRIC").reduce(means, [len(replica) for replica in replicas])
    assert reduced == pytest.approx(sum(rows) / len(rows) if rows else 0.0, abs=1e-9)


def test_metrics_of_replicas_combine_name_by_name():
    combined = protocol("METRIC").combine(
        [
            Metrics(values={"loss": 1.0, "kl": 0.5}, counts={"loss": 1}),
            Metrics(values={"loss": 3.0}, counts={"loss": 3}),
        ]
    )
    assert combined == Metrics(values={"loss": 2.5, "kl": 0.5}, counts={"loss": 4.0, "kl": 1.0})
    assert protocol("METRIC").combine([]) == Metrics()


@given(groupings(), rows_counts)
def test_ranks_of_a_part_hold_one_range(grouping: GenerationGrouping, rows: int):
    for name in CUTTING:
        for part in plan_of(name, rows, grouping.topology, generation=grouping):
            assert all(after == before + 1 for before, after in pairwise(part))
