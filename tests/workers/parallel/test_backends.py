"""ZeRO and FSDP have the loss, gradients and next weights of one process, and each rank holds only its share of the
state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from protocols.layout.topology import Backend, Topology, generating_topology
from tests.workers.parallel.test_model import (
    BUDGET,
    HEAD_CHUNK,
    RATE,
    ROWS,
    Case,
    Step,
    folders,  # noqa: F401 - a fixture
    largest_difference,
    loss_of,
    part,
    rows,
    together,
    trained,
    whole,
)
from tests.workers.ranks import RankFailed, Worlds
from workers.parallel.backends import trained_model
from workers.parallel.fully_sharded import FullyShardedModel
from workers.parallel.model import ParallelModel, plan_of
from workers.parallel.sharding import Sharding
from workers.parallel.zero import Zero1Model, Zero2Model
from workers.settings import Model
from workers.training.outputs import Outputs

BACKENDS: list[Backend] = ["zero1", "zero2", "fsdp"]
TOPOLOGIES = ["1-1-2", "1-1-4", "1-2-2", "2-1-2"]
BUCKET_BYTES = 16 * 1024  # so that this model has several buckets
NOWHERE = ("", ())
Unreached = tuple[str, Sequence[int]]  # a module, and the replicas whose loss does not reach it


class SmallBuckets(Zero1Model):
    bucket_bytes = BUCKET_BYTES


class SmallBucketsOfGradient(Zero2Model):
    bucket_bytes = BUCKET_BYTES


MODELS: dict[Backend, type[ParallelModel]] = {
    "3d": ParallelModel,
    "zero1": SmallBuckets,
    "zero2": SmallBucketsOfGradient,
    "fsdp": FullyShardedModel,
}


def build(backend: Backend, topology: Topology, case: Case) -> ParallelModel:
    """The model that `trained_model` builds, in any dtype and with buckets that a small model fills."""
    return MODELS[backend](
        case.folder, topology, head=case.head, dtype=case.dtype, recompute=case.recompute, head_chunk=HEAD_CHUNK
    )


# --- what every rank runs


def sharded_step(
    backend: Backend,
    topology: Topology,
    case: Case,
    number: int,
    limit: float,
    steps: int = 1,
    unreached: Unreached = NOWHERE,
) -> Step:
    """The last of `steps` steps on these ranks, with unsharded gradients and weights on every replica."""
    model = build(backend, topology, case)
    module, replicas = unreached
    if model.place.dp in replicas:
        model.shard.get_submodule(module).register_forward_hook(lambda module, inputs, output: output.detach())
    data = part(rows(number), model.place.dp, topology.dp)
    share = trained(data) / trained(rows(number))
    optimizer = torch.optim.AdamW(model.optimized.values(), lr=RATE)
    loss, norm, gradients = 0.0, 0.0, {}
    for _ in range(steps):
        loss = model.backward(data, BUDGET, loss_of(data, case.head, share))
        gradients = {
            name: model.unshard(name, own.grad).clone() for name, own in model.optimized.items() if own.grad is not None
        }
        norm = model.clip_gradient(limit)
        optimizer.step()
        model.all_gather_updated()
        model.release_gradient()
    return Step(loss, norm, gradients, {name: model.weight(name).clone() for name in model.specs})


def logits_after(backend: Backend, topology: Topology, case: Case) -> list[Tensor]:
    """The logits of a forward pass after a backward pass that failed half way."""
    model = build(backend, topology, case)
    data = part(rows(ROWS), model.place.dp, topology.dp)

    def broken(outputs: Outputs, micro: object) -> Tensor:
        raise ArithmeticError("the loss")

    try:
        model.backward(data, BUDGET, broken)
    except ArithmeticError:
        model.release_gradient()
    return model.forward(data, BUDGET, lambda outputs, micro: outputs.before_response(micro))


class Bytes(NamedTuple):
    """Bytes of a model's training state on one rank, and the peak of its gradients."""

    weights: int
    gradient: int
    moments: int
    highest_gradient: int


def held(backend: Backend, topology: Topology, case: Case) -> Bytes:
    model = build(backend, topology, case)
    live: list[int] = []
    for parameter in model.shard.parameters():
        if not isinstance(model, FullyShardedModel):  # FSDP2 manages its gradients itself
            parameter.register_hook(lambda g, p=parameter: live.append(gradient_bytes(model) + with_own(p, g)))
    data = part(rows(ROWS), model.place.dp, topology.dp)
    optimizer = torch.optim.AdamW(model.optimized.values(), lr=RATE)
    model.backward(data, BUDGET, loss_of(data, case.head, 1.0))
    optimizer.step()
    gradient = sum(size_of(p.grad) for p in model.optimized.values() if p.grad is not None)
    if backend in ("zero1", "zero2"):
        assert all(parameter.grad is None for parameter in model.parameters.values())
    moments = sum(size_of(state[m]) for state in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq"))
    return Bytes(sum(map(size_of, model.parameters.values())), gradient, moments, max(live, default=0))


def with_own(parameter: nn.Parameter, arriving: Tensor) -> int:
    return size_of(arriving) if parameter.grad is None else 0


def gradient_bytes(model: ParallelModel) -> int:
    return sum(size_of(p.grad) for p in model.parameters.values() if p.grad is not None)


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def rehomed_step(topology: Topology, case: Case) -> bool:
    """Whether a step updates weights whose storage has changed since the optimizer was created."""
    model = build("zero1", topology, case)
    optimizer = torch.optim.SGD(model.optimized.values(), lr=RATE)
    for parameter in model.parameters.values():
        parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    data = part(rows(ROWS), model.place.dp, topology.dp)
    model.backward(data, BUDGET, loss_of(data, case.head, 1.0))
    optimizer.step()
    model.all_gather_updated()
    return all(not torch.equal(before[name], p) for name, p in model.parameters.items())


# --- the same numbers


def run(
    worlds: Worlds,
    backend: Backend,
    topology: str,
    case: Case,
    number: int,
    limit: float = math.inf,
    steps: int = 1,
    unreached: Unreached = NOWHERE,
) -> Step:
    """The last step on all ranks, assembled; all ranks must agree on loss and norm."""
    at = Topology.parse(topology)
    taken = worlds[at.world_size].call(sharded_step, backend, at, case, number, limit, steps, unreached)
    assert len({(step.loss, step.norm) for step in taken}) == 1
    plan = plan_of(AutoConfig.from_pretrained(case.folder), at, case.head)
    gradients = together(at, plan, [step.gradients for step in taken])
    weights = together(at, plan, [step.weights for step in taken])
    return Step(taken[0].loss, taken[0].norm, gradients, weights)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_loss_gradients_and_norm_are_those_of_one_process(worlds, folders, backend, topology: str, name: str):  # noqa: F811
    """qwen3: tied, with norms that tensor ranks replicate; llama: untied, with biases everywhere."""
    ours, theirs = run(worlds, backend, topology, Case(folders[name]), ROWS), whole(Case(folders[name]), ROWS)
    assert largest_difference(ours.gradients, theirs.gradients) < 1e-6
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert ours.norm == pytest.approx(theirs.norm, rel=1e-6)


@pytest.mark.parametrize("topology", ["1-1-4", "1-2-2", "2-1-2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_step_after_clipping_gives_the_same_weights(worlds, folders, backend, topology: str):  # noqa: F811
    """In float64, because Adam turns the rounding of a gradient near zero into a full step."""
    case = Case(folders["qwen3"], dtype=torch.float64)
    theirs = whole(case, ROWS, 0.5)
    ours = run(worlds, backend, topology, case, ROWS, 0.5)
    assert theirs.norm > 0.5  # it was clipped
    assert largest_difference(ours.weights, theirs.weights) < 1e-3 * RATE


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_steps_are_those_of_replicas_alike(worlds, folders, backend):  # noqa: F811
    case = Case(folders["llama"], dtype=torch.float64)
    ours, theirs = (run(worlds, which, "1-2-2", case, ROWS, 0.5, 3) for which in (backend, "3d"))
    assert largest_difference(ours.weights, theirs.weights) < 1e-3 * RATE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replica_without_rows_changes_nothing(worlds, folders, backend):  # noqa: F811
    ours, theirs = run(worlds, backend, "1-1-4", Case(folders["qwen3"]), 2), whole(Case(folders["qwen3"]), 2)
    assert largest_difference(ours.gradients, theirs.gradients) < 1e-6
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_head_of_one_row_is_divided_too(worlds, folders, backend):  # noqa: F811
    case = Case(folders["critic"], head="value")
    ours, theirs = run(worlds, backend, "1-1-2", case, ROWS), whole(case, ROWS)
    assert largest_difference(ours.gradients, theirs.gradients) < 1e-6
    assert ours.norm == pytest.approx(theirs.norm, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputing_activations_changes_nothing(worlds, folders, backend):  # noqa: F811
    kept = run(worlds, backend, "1-1-2", Case(folders["llama"]), ROWS)
    again = run(worlds, backend, "1-1-2", Case(folders["llama"], recompute=True), ROWS)
    assert largest_difference(again.gradients, kept.gradients) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_failed_half_way_leaves_a_model_that_answers(worlds, folders, backend):  # noqa: F811
    case = Case(folders["qwen3"])
    answers = worlds[2].call(logits_after, backend, Topology(1, 1, 2), case)
    straight = worlds[2].call(logits_after, "3d", Topology(1, 1, 2), case)
    for ours, theirs in zip(answers, straight, strict=True):
        torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("topology", ["1-1-2", "1-2-2"])
@pytest.mark.parametrize(
    ("backend", "replicas"),
    [("zero1", [0, 1]), ("zero1", [1]), ("zero2", [0, 1]), ("zero2", [0]), ("zero2", [1]), ("fsdp", [0, 1])],
)
def test_a_parameter_that_the_loss_does_not_reach_has_a_gradient_of_0(
    worlds,
    folders,  # noqa: F811
    backend: Backend,
    replicas: list[int],
    topology: str,
):
    """Like an expert without tokens. FSDP wants the same parameters reached on all replicas."""
    case, unreached = Case(folders["llama"], dtype=torch.float64), ("model.layers.1.mlp", replicas)
    ours, theirs = (run(worlds, which, topology, case, ROWS, 0.5, 2, unreached=unreached) for which in (backend, "3d"))
    assert largest_difference(ours.gradients, theirs.gradients) < 1e-12
    assert largest_difference(ours.weights, theirs.weights) < 1e-3 * RATE
    gradient = ours.gradients["model.layers.1.mlp.up_proj.weight"]
    assert bool(gradient.any()) == (replicas != [0, 1])


def test_a_step_lands_where_the_weights_are_now(worlds, folders):  # noqa: F811
    """The hybrid engine moves weights to other storage between steps."""
    assert all(worlds[2].call(rehomed_step, Topology(1, 1, 2), Case(folders["llama"])))


# --- memory


def whole_bytes(case: Case) -> int:
    return sum(size_of(weight) for weight in whole(case, ROWS).weights.values())


@pytest.mark.parametrize("topology", ["1-1-4", "1-2-2"])
def test_each_rank_holds_its_share_of_the_sharded_state(worlds, folders, topology: str):  # noqa: F811
    """Summed over the replicas of a tensor shard, sharded state takes the bytes of one copy: no entry is held twice."""
    at, case = Topology.parse(topology), Case(folders["llama"])
    by = {b: worlds[4].call(held, b, at, case) for b in ("3d", *BACKENDS)}
    alike = by["3d"]
    for rank in range(at.replica_size):
        replicas = range(rank, 4, at.replica_size)
        shard = alike[rank]

        def over(backend: str, field: str, ranks: range = replicas) -> list[int]:
            return [getattr(by[backend][r], field) for r in ranks]

        for backend in ("zero1", "zero2"):
            assert over(backend, "weights") == [shard.weights] * at.dp
            assert sum(over(backend, "moments")) == 2 * shard.weights
            assert sum(over(backend, "gradient")) == shard.weights
        for field, times in (("weights", 1), ("gradient", 1), ("moments", 2)):
            assert sum(over("fsdp", field)) == times * shard.weights
        uneven = 4 * 2 * len(whole(case, ROWS).weights)  # a range is at most one entry per tensor larger than its share
        assert max(over("zero1", "moments")) <= 2 * shard.weights / at.dp + uneven
        assert max(over("fsdp", "moments")) == 2 * shard.weights / at.dp  # these sizes divide


def test_zero_2_never_has_a_whole_gradient(worlds, folders):  # noqa: F811
    """Besides its own range a rank holds the gradients of unfinished buckets only."""
    case = Case(folders["llama"])
    first, second = (worlds[4].call(held, backend, Topology(1, 1, 4), case)[0] for backend in ("zero1", "zero2"))
    assert first.highest_gradient == whole_bytes(case)
    assert second.highest_gradient <= 2 * BUCKET_BYTES < whole_bytes(case) / 2


# --- construction


def test_with_one_replica_all_backends_are_one(folders):  # noqa: F811
    for backend in BACKENDS:
        assert type(trained_model(Model(path=folders["qwen2"]), Sharding(backend=backend))) is ParallelModel


def test_one_replica_can_not_be_sharded_over(folders):  # noqa: F811
    with pytest.raises(ValueError, match="topology 1-1-1 has one replica: there is nothing to shard the model over"):
        FullyShardedModel(folders["qwen2"], Topology())


def test_a_world_of_another_size_is_refused(worlds, folders):  # noqa: F811
    with pytest.raises(RankFailed, match=r"topology 1-1-4 has 4 ranks, torch\.distributed has 2"):
        worlds[2].call(logits_after, "fsdp", Topology(1, 1, 4), Case(folders["qwen2"]))


def test_fully_sharded_ranks_generate_as_tensor_ranks_would():
    assert generating_topology("fsdp", Topology(1, 1, 4)) == Topology(1, 4, 1)
    assert generating_topology("fsdp", Topology(1, 2, 2)) == Topology(1, 2, 2)
    assert generating_topology("zero2", Topology(1, 1, 4)) == Topology(1, 1, 4)
