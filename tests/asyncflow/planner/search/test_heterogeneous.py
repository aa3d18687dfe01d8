"""Several kinds of devices: models go where they are fast; with one kind the result is that of the plain search."""

from __future__ import annotations

import msgspec
import pytest

from asyncflow.planner.costs.devices import CATALOGUE, Cluster, Refused
from asyncflow.planner.costs.layouts import Layout
from asyncflow.planner.costs.shapes import LLAMA
from asyncflow.planner.costs.workload import Lengths, ModelWork, Workload, ppo
from asyncflow.planner.search.heterogeneous import combined_step_s, heterogeneous_placements
from asyncflow.planner.search.plan import ranked, ways_to_generate

A100 = CATALOGUE["A100-80G"]
WORK = Workload(128, Lengths.fixed(1024), Lengths.fixed(1024), staleness=1)
MODELS = ppo(LLAMA["7B"])


def any_layout(model: ModelWork, layout: Layout) -> bool:
    return True


def test_what_reads_goes_to_fast_memory_and_what_multiplies_to_fast_products():
    reads = msgspec.structs.replace(A100, name="reads", memory_bytes_per_s=8 * A100.memory_bytes_per_s)
    multiplies = msgspec.structs.replace(A100, name="multiplies", peak_flops=8 * A100.peak_flops)
    generating, computing = heterogeneous_placements(
        MODELS, [Cluster(reads, 8), Cluster(multiplies, 8)], WORK, 1, any_layout
    )[0]
    assert generating and computing
    assert [model.role for pool in generating.pools for model in pool.models] == ["generator"]
    assert {m.role for pool in computing.pools for m in pool.models} == {"policy", "critic", "reference", "reward"}


def test_devices_of_one_kind_are_mapped_as_without_kinds():
    ways = (ranked(works, Cluster(A100, 16), WORK, 2, any_layout) for works in ways_to_generate(MODELS))
    best = min((placement for way in ways for placement in way), key=lambda placement: placement.step_s)
    ((shared,), *_) = heterogeneous_placements(MODELS, [Cluster(A100, 16)], WORK, 2, any_layout)
    assert shared == best
    assert combined_step_s((shared,), WORK.staleness) == pytest.approx(best.step_s)


def test_a_kind_that_is_too_small_for_a_model_is_left_to_the_others():
    small = msgspec.structs.replace(A100, name="small", memory_bytes=20e9)
    for _, large in heterogeneous_placements(MODELS, [Cluster(small, 1), Cluster(A100, 16)], WORK, 4, any_layout):
        assert large and {"policy", "critic"} <= {m.role for pool in large.pools for m in pool.models}


def test_what_fits_nowhere_is_refused_with_the_numbers():
    small = msgspec.structs.replace(A100, name="small", memory_bytes=20e9)
    with pytest.raises(Refused, match=r"policy .* does not fit on 1xsmall: .* of 18\.0 GB usable"):
        heterogeneous_placements(MODELS, [Cluster(small, 1), Cluster(small, 2)], WORK, 1, any_layout)
