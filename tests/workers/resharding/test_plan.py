"""In every pair of layouts a rank receives exactly those entries of its generation shard that it does not own."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from protocols.layout.topology import GenerationGrouping, Style, Topology
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Decoder, Parameter, ShardPlan
from workers.resharding.plan import Collective, Layouts, gathered_name, gathered_stage, transition

Array = npt.NDArray[np.int64]

TIED = Decoder("qwen3", 4, 8, 16, heads=8, kv_heads=8, head_size=2, vocabulary=24, tied=True, qk_norm=True)
UNTIED = Decoder("llama", 4, 8, 16, heads=8, kv_heads=8, head_size=2, vocabulary=24, tied=False, output_bias=True)
SWEEP = [
    GenerationGrouping(Topology(p, t, 1), p_g, t_g)
    for p, t in product((1, 2, 4), (1, 2, 4, 8))
    for p_g, t_g in product((1, 2, 4), (1, 2, 4, 8))
    if p % p_g == 0 and t % t_g == 0
]
NAMED = ["1-4-2 -> 1-2", "1-2-2 -> 1-1", "2-2-2 -> 1-2", "2-4-1 -> 1-1", "1-8-1 -> 1-2", "4-2-1 -> 2-1"]


def grouping_of(text: str, style: Style = "hybridflow") -> GenerationGrouping:
    train, generate = (Topology.parse(layout) for layout in text.split(" -> "))
    return GenerationGrouping(train, generate.pp, generate.tp, style)


@cache
def whole(decoder: Decoder) -> dict[str, Array]:
    """Every tensor of the model with consecutively numbered entries, in memory order along its cut."""
    values: dict[str, Array] = {}
    start = 0
    for parameter in ShardPlan(decoder).parameters(0):
        values[parameter.name] = np.arange(start, start + parameter.elements)
        start += parameter.elements
    return values


class Simulation:
    """All ranks of a transition: executes the planned collectives on numbered entries."""

    def __init__(self, decoder: Decoder, grouping: GenerationGrouping, bucket: int = 100) -> None:
        self.grouping, self.topology = grouping, grouping.topology
        self.train = ShardPlan(decoder, self.topology.pp, self.topology.tp)
        self.layouts = Layouts.of(self.train, grouping)
        self.values = whole(decoder)
        ranks = range(self.topology.world_size)
        self.needs = [self._gathered(rank) for rank in ranks]
        self.owns = [self._owned(rank) for rank in ranks]
        self.has = [{name: np.full(len(v), -1) for name, v in need.items()} for need in self.needs]
        for rank in ranks:
            for name, (start, entries) in self.owns[rank].items():
                self.has[rank][name][start : start + len(entries)] = entries
        self.collectives = [transition(self.train, grouping, rank, bucket) for rank in ranks]
        self.received: list[dict[str, int]] = [dict.fromkeys(need, 0) for need in self.needs]
        self._play()

    def _slice(self, parameter: Parameter, index: int, of: int) -> Array:
        values = self.values[gathered_name(parameter.name, self.values)]
        size = len(values) // of
        return values[index * size : (index + 1) * size] if parameter.cut is not None else values

    def _gathered(self, rank: int) -> dict[str, Array]:
        plan = self.layouts.gather
        at, stage = self.grouping.coordinates(rank), gathered_stage(self.grouping, rank)
        index = at.tp if plan.tp > 1 else 0
        return {p.name: self._slice(p, index, plan.tp) for p in plan.parameters(stage)}

    def _owned(self, rank: int) -> dict[str, tuple[int, Array]]:
        """For each tensor: the offset of the rank's training shard in its generation shard, and the entries."""
        at = self.topology.coordinates(rank)
        found: dict[str, tuple[int, Array]] = {}
        for parameter in self.train.parameters(at.pp):
            entries = self._slice(parameter, at.tp, self.train.tp)
            name = gathered_name(parameter.name, self.needs[rank])
            start = int(np.searchsorted(self.needs[rank][name], entries[0]))
            found[name] = (start, entries)
        return found

    def _play(self) -> None:
        waiting = [list(collectives) for collectives in self.collectives]
        while any(waiting):
            collective = next(
                left[0] for left in waiting if left and all(waiting[m][:1] == [left[0]] for m in left[0].members)
            )
            self._collective(collective)
            for member in collective.members:
                waiting[member].pop(0)

    def _collective(self, collective: Collective) -> None:
        sent = [
            [self.has[owner][p.name][p.start : p.start + p.elements].copy() for p in slices]
            for owner, slices in zip(collective.owners, collective.slices, strict=True)
        ]
        for member in collective.members:
            for owner, slices, arrays in zip(collective.owners, collective.slices, sent, strict=True):
                for part, array in zip(slices, arrays, strict=True):
                    if owner != member:
                        self.has[member][part.name][part.start : part.start + part.elements] = array
                        self.received[member][part.name] += part.elements

    def received_by(self, rank: int, kind: str) -> int:
        return sum(n for name, n in self.received[rank].items() if kind_of(name) == kind)

    def size(self, kind: str) -> int:
        return sum(len(values) for name, values in self.values.items() if kind_of(name) == kind)


@cache
def simulated(decoder: Decoder, grouping: GenerationGrouping) -> Simulation:
    return Simulation(decoder, grouping)


def kind_of(name: str) -> str:
    """A tensor's kind: "matrix" (of a layer, and its cut biases), "whole" (uncut, of a layer) or "end" (the rest)."""
    if not name.startswith("model.layers."):
        return "end"
    return "whole" if "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")) else "matrix"


def missing(simulation: Simulation, rank: int, name: str) -> int:
    """The number of entries of a gathered tensor that the rank doesn't own."""
    own = simulation.owns[rank].get(name)
    return len(simulation.needs[rank][name]) - (len(own[1]) if own else 0)


@pytest.mark.parametrize("decoder", [TIED, UNTIED], ids=["tied", "untied"])
def test_every_rank_ends_with_its_generation_shard(decoder: Decoder):
    for grouping in SWEEP:
        simulation = simulated(decoder, grouping)
        for has, needs in zip(simulation.has, simulation.needs, strict=True):
            for name, entries in has.items():
                assert np.array_equal(entries, needs[name]), (grouping, name)


def test_a_rank_receives_what_it_needs_less_what_it_owns_entry_for_entry():
    for grouping in SWEEP:
        simulation = simulated(UNTIED, grouping)
        for rank, received in enumerate(simulation.received):
            assert received == {name: missing(simulation, rank, name) for name in received}, grouping


def test_the_layers_volume_is_the_papers_on_every_rank():
    for grouping in SWEEP:
        simulation = simulated(UNTIED, grouping)
        expected = grouping.received_bytes(simulation.size("matrix"))
        norms = simulation.size("whole") * (Fraction(1, grouping.pp) - Fraction(1, grouping.topology.pp))
        for rank in range(grouping.topology.world_size):
            assert simulation.received_by(rank, "matrix") == expected, grouping
            assert simulation.received_by(rank, "whole") == norms, grouping


def test_the_ends_cost_more_on_ranks_that_did_not_train_them():
    simulation = simulated(UNTIED, grouping_of("2-4-1 -> 1-2"))
    matrix = len(simulation.values[EMBEDDING])
    embedding = [received[EMBEDDING] for received in simulation.received]
    head = [received[TOKEN_HEAD] for received in simulation.received]
    assert embedding == [matrix // 2 - matrix // 4] * 4 + [matrix // 2] * 4
    assert head == [matrix // 2] * 4 + [matrix // 2 - matrix // 4] * 4


def test_a_tied_matrix_moves_once_and_from_the_first_stage():
    """The last stage receives a shard that it already has as its tied copy: the only redundant transfer."""
    for grouping in SWEEP:
        simulation = simulated(TIED, grouping)
        for rank, received in enumerate(simulation.received):
            last = grouping.pp == 1 < grouping.topology.pp == grouping.topology.coordinates(rank).pp + 1
            copy = len(simulation.values[EMBEDDING]) // grouping.topology.tp if last else 0
            for name, count in received.items():
                assert count == missing(simulation, rank, name) + (copy if name == EMBEDDING else 0), (grouping, name)


@pytest.mark.parametrize("text", NAMED)
@pytest.mark.parametrize("style", ["vanilla", "deepspeed"])
def test_the_other_styles_gather_the_whole_model(text: str, style: Style):
    grouping = grouping_of(text, style)
    simulation = simulated(TIED, grouping)
    expected = grouping.received_bytes(simulation.size("matrix"))
    for rank, has in enumerate(simulation.has):
        assert simulation.received_by(rank, "matrix") == expected
        assert all(np.array_equal(has[name], entries) for name, entries in simulation.values.items())


@pytest.mark.parametrize("bucket", [8, 64, 10_000])
def test_a_bucket_bounds_what_a_collective_brings(bucket: int):
    moves = transition(ShardPlan(TIED, 2, 4), grouping_of("2-4-1 -> 1-1"), 3, bucket)
    assert max(len(collective.owners) * collective.width for collective in moves) <= bucket
    assert sum(collective.received_elements(3) for collective in moves) == sum(
        part.elements
        for collective in moves
        for owner, slices in zip(collective.owners, collective.slices, strict=True)
        for part in slices
        if owner != 3
    )  # no padding


def test_nothing_moves_where_generation_is_cut_as_training_is():
    assert transition(ShardPlan(TIED, 2, 4), grouping_of("2-4-1 -> 2-4"), 0, 100) == []


def test_what_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="bucket of 3 entries: 4 ranks send at least one each"):
        transition(ShardPlan(TIED, 1, 4), grouping_of("1-4-1 -> 1-1"), 0, 3)
    with pytest.raises(ValueError, match="model is cut 1-2, the grouping's topology is 1-4-1"):
        transition(ShardPlan(TIED, 1, 2), grouping_of("1-4-1 -> 1-1"), 0, 100)
