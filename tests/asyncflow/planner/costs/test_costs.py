"""The cost model: exact where the arithmetic is known, monotone where only the direction is known."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncflow.planner.costs import costs
from asyncflow.planner.costs.devices import CATALOGUE, Device, Efficiency
from asyncflow.planner.costs.memory import footprint, generation_bytes, kv_capacity
from asyncflow.planner.costs.shapes import LLAMA, Shape
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload
from protocols.layout.topology import GenerationGrouping, Topology

A100 = CATALOGUE["A100-80G"]
IDEAL = msgspec.structs.replace(
    A100,
    efficiency=Efficiency(1.0, 1.0, 1.0, 1.0, link_latency_s=0, network_latency_s=0, host_step_s=0, host_sequence_s=0),
)
WORK = Workload(64, Lengths.fixed(1024), Lengths.fixed(1024), mini_batches=2)
SMALL = LLAMA["7B"]

Cost = Callable[[Device], float]
COSTS: dict[str, Cost] = {
    "inference": lambda device: costs.forward_s(SMALL, Topology(2, 4, 2), WORK, device),
    "training": lambda device: costs.update_s(SMALL, Topology(2, 4, 4), WORK, device, recompute=False),
    "recomputing": lambda device: costs.update_s(SMALL, Topology(1, 4, 4), WORK, device, recompute=True),
    "generation": lambda device: costs.generation_s(SMALL, 2, 4, 2, 64, 24, WORK, device).latency_s,
    "occupation": lambda device: costs.generation_s(SMALL, 2, 4, 2, 64, 24, WORK, device).load_s,
    "transition": lambda device: costs.transition_s(SMALL, Topology(1, 8, 2), 1, 2, device),
    "publication": lambda device: costs.publication_s(SMALL, 1, 2, device),
}
FIGURES = ("peak_flops", "memory_bytes_per_s", "link_bytes_per_s", "network_bytes_per_s")


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("name", COSTS)
def test_a_faster_device_is_never_slower(name: str, figure: str):
    faster = msgspec.structs.replace(A100, **{figure: getattr(A100, figure) * 1.7})
    assert COSTS[name](faster) <= COSTS[name](A100)


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("inference", "peak_flops"),
        ("training", "network_bytes_per_s"),
        ("generation", "memory_bytes_per_s"),
        ("transition", "link_bytes_per_s"),
        ("publication", "network_bytes_per_s"),
    ],
)
def test_each_cost_feels_what_bounds_it(name: str, figure: str):
    faster = msgspec.structs.replace(A100, **{figure: getattr(A100, figure) * 1.7})
    assert COSTS[name](faster) < 0.99 * COSTS[name](A100)


def test_inference_on_one_ideal_device_is_its_flops():
    flops = 64 * 2048 * SMALL.forward_flops(1024)
    assert costs.forward_s(SMALL, Topology(), WORK, IDEAL) == pytest.approx(flops / 312e12)
    passed_through = SMALL.parameters - SMALL.vocabulary * SMALL.hidden - SMALL.hidden  # not the look-up, the last norm
    assert SMALL.forward_flops(0) == 2 * passed_through


def test_a_pipeline_waits_for_one_bubble_a_pass_at_the_pace_of_the_stage_with_the_head():
    whole = costs.forward_s(SMALL, Topology(1, 1, 1), WORK, IDEAL)
    no_wire = msgspec.structs.replace(IDEAL, link_bytes_per_s=1e30, network_bytes_per_s=1e30)
    halves = costs.forward_s(SMALL, Topology(2, 1, 1), WORK, no_wire)
    micro_batches = 64 / costs.micro_rows(64, 2, WORK)
    slowest = SMALL.stage_flops(2, 1024) / SMALL.forward_flops(1024)
    assert 0.5 < slowest < 0.52
    assert halves / whole == pytest.approx((micro_batches + 1) / micro_batches * slowest)


def test_recomputation_costs_a_forward_pass_more():
    no_state = msgspec.structs.replace(IDEAL, memory_bytes_per_s=1e30)
    kept, again = (costs.update_s(SMALL, Topology(), WORK, no_state, recompute=r) for r in (False, True))
    assert again / kept == pytest.approx(4 / 3)


def test_a_ring_all_reduce_moves_its_bound():
    assert costs.all_reduce_s(8e9, 8, IDEAL) == pytest.approx(2 * 7 / 8 * 8e9 / 300e9)
    assert costs.all_reduce_s(8e9, 16, IDEAL) == pytest.approx(2 * 15 / 16 * 8e9 / 25e9)
    assert costs.all_reduce_s(8e9, 1, IDEAL) == 0


def test_decoding_one_sequence_reads_the_weights_and_its_cache():
    seconds = costs.decode_s(SMALL, 1, 1, 1, 1000, IDEAL)
    assert seconds == pytest.approx((SMALL.parameters * 2 + 1000 * 2**19) / 2039e9)


def test_a_batch_beyond_the_cache_takes_its_turns():
    one, two = (costs.generation_s(SMALL, 1, 1, 1, 64, c, WORK, IDEAL).latency_s for c in (64, 32))
    weights = 1024 * SMALL.parameters * 2 / 2039e9  # what a second round reads once more
    assert two - one == pytest.approx(weights)


def test_a_long_tail_delays_the_batch_and_occupies_the_engine_less():
    fixed = costs.generation_s(SMALL, 1, 1, 1, 64, 64, WORK, A100)
    assert fixed.latency_s == pytest.approx(fixed.load_s)
    tailed = msgspec.structs.replace(WORK, response=Lengths.long_tailed(700, 0.9, 8192))
    generation = costs.generation_s(SMALL, 1, 1, 1, 64, 64, tailed, A100)
    assert generation.latency_s > 1.5 * generation.load_s


@pytest.mark.parametrize(("p", "t", "pg", "tg"), [(1, 8, 1, 2), (2, 4, 1, 4), (4, 2, 2, 1), (1, 4, 1, 4)])
def test_the_transition_moves_what_the_grouping_moves(p: int, t: int, pg: int, tg: int):
    m = SMALL.parameters * 2
    moved = GenerationGrouping(Topology(p, t, 2), pg, tg).received_bytes(m)
    assert costs.transition_s(SMALL, Topology(p, t, 2), pg, tg, IDEAL) == pytest.approx(float(moved) / 300e9)


def test_mixed_precision_training_holds_eighteen_bytes_a_parameter():
    held = footprint(ModelWork("policy", SMALL, trains=True), Topology(), WORK, recompute=True)
    assert held.resident + held.gradients == pytest.approx(18 * SMALL.parameters)
    spread = footprint(ModelWork("policy", SMALL, trains=True), Topology(1, 1, 4), WORK, recompute=True)
    assert spread.optimizer == pytest.approx(held.optimizer / 4)
    assert footprint(ModelWork("reference", SMALL, forwards=1), Topology(), WORK, False).resident == pytest.approx(
        2 * SMALL.parameters
    )


def test_the_cache_holds_whole_sequences_and_none_if_the_longest_does_not_fit():
    sequence = 2048 * 2**19  # half a mebibyte a token of a 7B model in bfloat16
    assert kv_capacity(SMALL, 1, 1, 10.5 * sequence, WORK) == 10
    assert kv_capacity(SMALL, 1, 4, 10.5 * sequence, WORK) == 42
    assert kv_capacity(SMALL, 1, 1, 0.9 * sequence, WORK) == 0
    tailed = msgspec.structs.replace(WORK, response=Lengths((10.0, 4000.0)))
    assert kv_capacity(SMALL, 1, 1, 5000 * 2**19, tailed) == 0 < kv_capacity(SMALL, 1, 1, 5100 * 2**19, tailed)
    grouped = LLAMA["70B"]
    assert grouped.kv_bytes(1, 16) == grouped.kv_bytes(1, 8)  # 8 heads: the ninth rank repeats one


def test_generation_adds_only_what_the_training_shard_lacks():
    assert generation_bytes(SMALL, Topology(1, 8, 2), 1, 2) == pytest.approx(SMALL.parameters * 2 * 3 / 8)
    assert generation_bytes(SMALL, Topology(1, 4, 2), 1, 4) == 0


@given(
    shape=st.sampled_from([LLAMA["7B"], LLAMA["70B"]]),
    tp=st.sampled_from([1, 2, 4, 8]),
    dp=st.integers(1, 32),
    rows=st.integers(1, 512),
)
@settings(max_examples=60, deadline=None)
def test_more_work_is_never_faster_and_more_replicas_never_slower(shape: Shape, tp: int, dp: int, rows: int):
    def workload(prompts: int) -> Workload:
        return msgspec.structs.replace(WORK, prompts_per_step=prompts, mini_batches=1, micro_batch_tokens=2048)

    def seconds(prompts: int, dp: int) -> list[float]:
        topology, work = Topology(1, tp, dp), workload(prompts)
        generated = costs.generation_s(shape, 1, tp, dp, prompts, 64, work, A100)
        return [costs.forward_s(shape, topology, work, A100), *generated]

    now = seconds(rows, dp)
    assert all(more >= once * (1 - 1e-12) for more, once in zip(seconds(rows + 7, dp), now, strict=True))
    assert all(wider <= once * (1 + 1e-12) for wider, once in zip(seconds(rows, dp + 1), now, strict=True))
