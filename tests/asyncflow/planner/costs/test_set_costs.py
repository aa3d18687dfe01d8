"""The table of costs: the fastest layouts that fit together, and the shapes that the paper measured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import msgspec
import pytest

from asyncflow.planner.costs import costs, memory
from asyncflow.planner.costs.devices import CATALOGUE, Cluster, Device, Refused
from asyncflow.planner.costs.layouts import LayoutChoice
from asyncflow.planner.costs.set_costs import SetCosts
from asyncflow.planner.costs.shapes import LLAMA, Shape
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload, ppo, with_separate_generator
from protocols.layout.topology import Topology
from tests.asyncflow.planner.search import paper_search
from tests.asyncflow.planner.search.paper_setting import DEVICE, WORKLOAD, cluster, even

A100 = CATALOGUE["A100-80G"]
SMALL = LLAMA["7B"]
SHORT = Workload(64, Lengths.fixed(512), Lengths.fixed(512))


def exhaustive(models: list[ModelWork], devices: int, device: Device, work: Workload) -> Iterator[float]:
    """Seconds of every combination of the models' layouts that fits; models[0] generates and trains."""
    options = []
    for model in models:
        found = []
        for p, t, d in paper_search.algorithm_2(
            paper_search.shards(model.shape), model.shape.layers, devices, device.devices_per_node
        ):
            for recompute in (False, True):
                pairs = product(range(1, p + 1), range(1, t + 1)) if model.generates else [(0, 0)]
                found += [
                    (Topology(p, t, d), recompute, pg, tg) for pg, tg in pairs if not pg or (p % pg == t % tg == 0)
                ]
        options.append(found)
    for layouts in product(*options):
        held = [
            memory.footprint(model, topology, work, recompute)
            for model, (topology, recompute, *_) in zip(models, layouts, strict=True)
        ]
        resident = sum(one.resident for one in held)
        if resident + max(one.transient for one in held) > device.usable_bytes:
            continue
        topology, recompute, pg, tg = layouts[0]
        shape = models[0].shape
        free = device.usable_bytes - resident - memory.generation_bytes(shape, topology, pg, tg)
        capacity = memory.kv_capacity(shape, pg, tg, free, work)
        if capacity < 1:
            continue
        engines = devices // (pg * tg)
        seconds = costs.generation_s(shape, pg, tg, engines, work.samples, capacity, work, device).latency_s
        seconds += costs.transition_s(shape, topology, pg, tg, device)
        for model, (topology, recompute, *_) in zip(models, layouts, strict=True):
            seconds += model.forwards * costs.forward_s(model.shape, topology, work, device)
            seconds += costs.update_s(model.shape, topology, work, device, recompute) if model.trains else 0.0
        yield seconds


def chosen(found: SetCosts, mask: int, devices: int) -> LayoutChoice:
    choice = found.chosen[mask][devices]
    assert choice is not None
    return choice


@pytest.mark.parametrize("memory_gb", [0.6, 0.8, 1, 1.3, 1.8, 2.6, 4])  # from hardly fitting to roomy
def test_a_set_gets_the_best_of_all_combinations_of_layouts(memory_gb: float):
    """The critic's activations exceed the policy's, so the peak mixes resident and transient memory of two models."""
    device = msgspec.structs.replace(A100, memory_bytes=memory_gb * 1e9)
    narrow = Shape("narrow", layers=2, hidden=1024, intermediate=4096, heads=4, kv_heads=4, vocabulary=2000)
    deep = msgspec.structs.replace(narrow, layers=3).scoring()
    models = [
        ModelWork("policy", narrow, 1, 0, True),
        ModelWork("critic", deep, forwards=1, trains=True),
        ModelWork("reference", narrow, forwards=1),
    ]
    found = SetCosts(models, Cluster(device, 8), SHORT)
    best = float("inf")
    for devices in range(1, 9):
        best = min([best, *exhaustive(models, devices, device, SHORT)])
        choice = found.chosen[0b111][devices]
        assert (choice.total_s if choice else float("inf")) == pytest.approx(best)
    assert best < float("inf")


def test_more_devices_are_never_slower_and_fuller_sets_never_faster():
    found = SetCosts(ppo(SMALL), Cluster(A100, 24), WORKLOAD)
    for mask, row in found.chosen.items():
        times = [choice.total_s if choice else float("inf") for choice in row]
        assert times == sorted(times, reverse=True)
        for index in range(4):
            if mask >> index & 1 and mask != 1 << index:
                fewer = [choice.total_s if choice else float("inf") for choice in found.chosen[mask ^ 1 << index]]
                assert all(less <= more for less, more in zip(fewer, times, strict=True))


def test_what_is_chosen_fits_and_adds_up():
    found = SetCosts(ppo(SMALL), Cluster(A100, 16), WORKLOAD)
    for mask, row in found.chosen.items():
        for choice in filter(None, row):
            parts = found.parts(choice)
            assert choice.peak <= A100.usable_bytes
            assert sorted(index for index, _ in choice.layouts) == [i for i in range(4) if mask >> i & 1]
            assert choice.resident == pytest.approx(sum(own.resident for _, _, own in parts))
            assert choice.total_s == pytest.approx(sum(own.total_s for _, _, own in parts))


def test_colocated_models_leave_the_generator_less_cache():
    found = SetCosts(ppo(SMALL), Cluster(A100, 8), WORKLOAD)
    alone, together = (chosen(found, mask, 8) for mask in (0b0001, 0b1111))
    room = [found.cache_bytes(choice, dict(choice.layouts)[0]) for choice in (alone, together)]
    assert room[1] < room[0] and together.generation_s > alone.generation_s


def test_a_generator_apart_never_shares_devices_with_its_policy():
    found = SetCosts(with_separate_generator(ppo(SMALL)), Cluster(A100, 16), WORKLOAD)
    assert all(choice is None for choice in found.chosen[0b00011])
    assert chosen(found, 0b00101, 16)  # with the critic it may


def test_asynchrony_hides_the_shorter_of_rollout_and_training():
    tailed = msgspec.structs.replace(WORKLOAD, response=Lengths.long_tailed(400, 0.8, 2048), mini_batches=1)
    steps = []
    for staleness in (0, 1, 2):
        work = msgspec.structs.replace(tailed, staleness=staleness)
        ways = [
            SetCosts(models, Cluster(A100, 64), work) for models in (ppo(SMALL), with_separate_generator(ppo(SMALL)))
        ]
        steps.append(min(way.best(64)[0].step_s for way in ways))
    assert steps[1] < 0.9 * steps[0] and steps[2] <= steps[1]


# --- refusals carry the numbers


def test_a_model_too_large_is_refused_with_what_it_holds():
    with pytest.raises(Refused, match=r"policy \(llama-70B\) does not fit on 16xA100.*89\.5 GB a device.*72\.0 GB"):
        SetCosts(ppo(LLAMA["70B"]), Cluster(A100, 16), WORKLOAD)


def test_models_too_large_together_are_refused_with_what_each_needs():
    found = SetCosts(ppo(LLAMA["34B"]), Cluster(A100, 16), WORKLOAD)
    with pytest.raises(Refused, match=r"4 models do not fit together on 16 A100-80G of 72\.0 GB.*policy .* from \d+"):
        found.best(16)


def test_a_sample_longer_than_the_cache_is_refused():
    endless = msgspec.structs.replace(SHORT, response=Lengths.fixed(300_000), micro_batch_tokens=1)
    generator = ModelWork("generator", SMALL, generates=1)
    with pytest.raises(Refused, match="no room for one sequence of 300512 tokens"):
        SetCosts([generator], Cluster(A100, 1), endless)


def test_heads_and_layers_that_do_not_divide_are_not_cut():
    odd = Shape("odd", layers=25, hidden=1792, intermediate=4864, heads=14, kv_heads=2, vocabulary=32000)
    found = SetCosts(ppo(odd), Cluster(A100, 8), SHORT)
    cuts = {
        (layout.topology.tp, layout.topology.pp)
        for row in found.chosen.values()
        for choice in filter(None, row)
        for _, layout in choice.layouts
    }
    assert all(14 % tp == 0 and 25 % pp == 0 for tp, pp in cuts)


def test_two_models_that_generate_are_refused():
    with pytest.raises(Refused, match=r"one model generates in a step, not 2: a \(llama-7B\), b"):
        SetCosts([ModelWork(role, SMALL, generates=1) for role in "ab"], Cluster(A100, 8), SHORT)


# --- the paper's shapes, in the paper's setting, with no constant of their own


@pytest.mark.parametrize(("size", "best"), [("7B", 2), ("13B", 4)])
def test_the_generation_layout_that_is_best_after_training_at_1_8_2(size: str, best: int):
    shape, topology = LLAMA[size], Topology(1, 8, 2)
    held = memory.footprint(ModelWork("policy", shape, 1, 0, True), topology, WORKLOAD, recompute=True)
    seconds = {}
    for tp in (1, 2, 4, 8):
        free = DEVICE.usable_bytes - held.resident - memory.generation_bytes(shape, topology, 1, tp)
        capacity = memory.kv_capacity(shape, 1, tp, free, WORKLOAD)
        generated = costs.generation_s(shape, 1, tp, 16 // tp, WORKLOAD.samples, capacity, WORKLOAD, DEVICE)
        seconds[tp] = generated.latency_s + costs.transition_s(shape, topology, 1, tp, DEVICE)
    assert min(seconds, key=lambda tp: seconds[tp]) == best


@pytest.mark.parametrize("size", ["7B", "13B"])
def test_colocating_all_models_is_best_at_small_scale(size: str):
    found = SetCosts(ppo(LLAMA[size]), cluster(64), WORKLOAD)
    assert [len(found.best(devices)[0].sets) for devices in (16, 32, 64)] == [1, 1, 1]


def test_splitting_34b_is_best_at_large_scale_only():
    found = SetCosts(ppo(LLAMA["34B"]), cluster(128), WORKLOAD)
    assert [len(found.best(devices)[0].sets) for devices in (64, 96, 128)] == [1, 2, 2]


def test_the_13b_policy_and_critic_part_where_batches_are_cut_evenly_over_96():
    """3 divides neither the heads nor the layers nor the batch, so shared layouts use at most 80 of the 96 devices."""
    found = SetCosts(ppo(LLAMA["13B"]), cluster(96), WORKLOAD, allows=even)
    assert sorted(count for _, count in found.best(96)[0].sets) == [32, 64]
    assert [len(found.best(devices)[0].sets) for devices in (32, 64)] == [1, 1]
