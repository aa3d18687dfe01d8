"""A model in bfloat16 trains as in float32: what is stepped, summed, saved and resharded are float32 master weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from protocols.data.columns import take
from protocols.data.messages import Experience
from protocols.layout.topology import Backend, Topology
from protocols.layout.transfer import protocol
from protocols.weights import Version
from tests import tiny
from tests.workers.batches import VOCABULARY, experience
from tests.workers.checkpoints import contents
from tests.workers.training.test_offload import elsewhere
from workers.generation.packed import PackedWeights
from workers.losses.aggregation import reduce_loss
from workers.parallel.backends import frozen_model, trained_model
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.roles.policy import PolicyWorker
from workers.settings import Dtype, Generation, Lora, Loss, Model, Optimizer
from workers.training.micro_batches import MicroBatch
from workers.training.models import load_causal, response_log_probs
from workers.training.optimizer_step import StepRefused
from workers.training.outputs import Outputs

RATE = 1e-6  # of RL: an update is far below half a step of most weights in bfloat16
STEPS = 20
NO_ADAPTERS = Lora()
ROWS = 5  # three and two on two replicas
GENERATION = Generation(engine="torch")
BACKENDS: list[Backend] = ["3d", "zero1", "zero2", "fsdp"]
TWO = Topology(1, 1, 2)
CUT = Sharding(Topology(1, 2, 1))


class Moved(NamedTuple):
    """What a rank saw of some steps in bfloat16."""

    share: float  # of the masters' entries that moved
    rounded: bool  # whether the weights are the masters' rounding
    gradients: set[torch.dtype]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_policy(tmp_path_factory.mktemp("policy"), vocabulary=VOCABULARY))


def policy_at(sharding: Sharding, folder: str, dtype: Dtype = "bfloat16", lora: Lora = NO_ADAPTERS) -> PolicyWorker:
    model = Model(path=folder, learning_rate=RATE, dtype=dtype, lora=lora)
    loss = Loss(tokens_per_micro_batch=40)
    return PolicyWorker(model, loss, Optimizer(), GENERATION, seed=3, sharding=sharding)


def own_rows(policy: PolicyWorker) -> Experience:
    shares = protocol("METRIC").distribute(rows=ROWS, topology=policy.model.topology)
    return take(experience(ROWS), shares[policy.model.rank])


def masters(policy: PolicyWorker) -> dict[str, Tensor]:
    """The shards of all parameters as they are stepped; all replicas call."""
    return {name: policy.model.stepped_weight(name).clone() for name in policy.model.optimized}


def moved(sharding: Sharding, folder: str, dtype: Dtype, lora: Lora = NO_ADAPTERS) -> Moved:
    policy = policy_at(sharding, folder, dtype, lora)
    before, data, seen = masters(policy), own_rows(policy), set()
    policy.trained._optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.update(p.grad.dtype for p in optimizer.param_groups[0]["params"])
    )
    for _ in range(STEPS):
        policy.update(data)
    after = masters(policy)
    changed = sum(int((after[name] != before[name]).sum()) for name in before)
    rounded = all(
        torch.equal(policy.model.weight(name), after[name].to(policy.model.weight(name).dtype)) for name in after
    )
    return Moved(changed / sum(tensor.numel() for tensor in after.values()), rounded, seen)


# --- learning


@pytest.fixture(scope="module")
def in_float32(folder: str) -> Moved:
    return moved(ONE_DEVICE, folder, "float32")


def test_nearly_all_weights_move_as_in_float32(folder: str, in_float32: Moved):
    ours = moved(ONE_DEVICE, folder, "bfloat16")
    assert in_float32.share > 0.9
    assert ours.share == pytest.approx(in_float32.share, abs=0.01)
    assert ours.rounded
    assert ours.gradients == {torch.float32}


@pytest.mark.parametrize("sharding", [*(Sharding(TWO, backend) for backend in BACKENDS), CUT], ids=str)
def test_they_move_on_every_backend(worlds, folder: str, in_float32: Moved, sharding: Sharding):
    for rank in worlds[2].call(moved, sharding, folder, "bfloat16"):
        assert rank.share == pytest.approx(in_float32.share, abs=0.01)
        assert rank.rounded
        assert rank.gradients == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_of_a_bfloat16_base_move_on_every_backend(worlds, folder: str, backend: Backend):
    for rank in worlds[2].call(moved, Sharding(TWO, backend), folder, "bfloat16", Lora(rank=4)):
        assert rank.share > 0.9
        assert rank.gradients == {torch.float32}


def sum_of_equal_rows(sharding: Sharding, folder: str, copies: int) -> dict[str, Tensor]:
    """The gradient of as many copies of one row, each in a micro-batch of its own."""
    model = trained_model(Model(path=folder, dtype="bfloat16"), sharding)
    data = take(experience(ROWS), np.zeros(copies, np.int64))

    def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
        log_probs = response_log_probs(outputs, micro)
        return reduce_loss(-log_probs, torch.ones_like(log_probs))

    model.backward(data, 1, loss)
    own = {name: p.grad for name, p in model.optimized.items() if p.grad is not None}
    return {name: model.unshard(name, gradient).clone() for name, gradient in own.items()}


@pytest.mark.parametrize("sharding", [*(Sharding(TWO, backend) for backend in BACKENDS), CUT], ids=str)
def test_micro_batches_and_replicas_add_up_without_rounding(worlds, folder: str, sharding: Sharding):
    """Most multiples of a bfloat16 number are none, and differ from the nearest by up to 0.4 %."""
    copies = 11
    calls = (worlds[2].call(sum_of_equal_rows, sharding, folder, number) for number in (1, copies))
    for one, many in zip(*calls, strict=True):
        assert max(float(tensor.abs().max()) for tensor in one.values()) > 0.0
        for name, tensor in one.items():
            torch.testing.assert_close(many[name], tensor * copies, rtol=1e-5, atol=0.0)


def test_a_step_that_fails_leaves_masters_and_weights_bitwise_as_they_were(folder: str):
    policy = policy_at(ONE_DEVICE, folder)
    data = own_rows(policy)
    policy.update(data)
    before = masters(policy), {name: p.detach().clone() for name, p in policy.model.parameters.items()}
    policy.trained._learning_rate = float("inf")  # the second forward pass gives NaN
    with pytest.raises(StepRefused), policy.trained.update(2):
        for _ in range(2):
            policy.trained.step("a test", data, 100, lambda outputs, micro: -response_log_probs(outputs, micro).mean())
    after = masters(policy), dict(policy.model.parameters)
    for ours, theirs in zip(after, before, strict=True):
        assert all(torch.equal(ours[name].detach(), tensor) for name, tensor in theirs.items())


# --- what is computed and published


def test_training_starts_from_the_values_of_the_folder_and_computes_as_who_only_answers(folder: str):
    policy = policy_at(ONE_DEVICE, folder)
    for name, tensor in load_causal(folder).named_parameters():
        assert torch.equal(masters(policy)[name], tensor)
    frozen = frozen_model(Model(path=folder, dtype="bfloat16"), ONE_DEVICE)
    assert {p.dtype for p in frozen.parameters.values()} == {torch.bfloat16}
    assert not frozen.optimized
    assert all(torch.equal(policy.model.parameters[name], tensor) for name, tensor in frozen.parameters.items())


def publish_and_move(sharding: Sharding, folder: str, out: str) -> tuple[list[str], bool]:
    """The dtypes of a publication, and whether it and the next step are the same after all storage has changed."""
    policies = [policy_at(sharding, folder) for _ in range(2)]
    published: list[PackedWeights] = []
    for moves, policy in enumerate(policies):
        policy.update(own_rows(policy))
        if moves:
            policy.trained.relocate(elsewhere)
        policy.update(own_rows(policy))
        published.append(policy.snapshot(Version(0, 1)))
    policies[0].export(out)
    first, second = published
    if first is None:
        return [], True
    return sorted({t.dtype for t in first.manifest.tensors}), first.buffer.tobytes() == second.buffer.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_publication_and_export_are_bfloat16_and_masters_move_between_devices(
    worlds, folder: str, tmp_path: Path, backend: Backend
):
    out = str(tmp_path / "out")
    assert worlds[2].call(publish_and_move, Sharding(TWO, backend), folder, out)[0] == (["bfloat16"], True)
    assert {tensor.dtype for tensor in load_file(f"{out}/model.safetensors").values()} == {torch.bfloat16}


# --- checkpoints


def carry_on(sharding: Sharding, folder: str, came: str, goes: str, steps: int) -> bytes | None:
    """Load, take steps and save; the published bytes."""
    policy = policy_at(sharding, folder)
    if came:
        policy.load(came)
    for _ in range(steps):
        policy.update(own_rows(policy))
    policy.save(goes)
    published = policy.snapshot(Version(0, 9))
    return published.buffer.tobytes() if published else None


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {name.split(": ")[-1]: data for name, data in contents(folder).items() if "trainer.json" not in name}


def new(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def test_masters_and_moments_are_saved_in_float32_and_a_resume_is_never_having_stopped(folder: str, tmp_path: Path):
    carry_on(ONE_DEVICE, folder, "", new(tmp_path / "stop"), 2)
    (saved,) = (tmp_path / "stop").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(saved).values()} == {torch.float32}
    resumed = carry_on(ONE_DEVICE, folder, str(tmp_path / "stop"), new(tmp_path / "resumed"), 2)
    straight = carry_on(ONE_DEVICE, folder, "", new(tmp_path / "straight"), 4)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    assert resumed == straight


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_goes_through_every_backend_bit_by_bit(worlds, folder: str, tmp_path: Path, backend: Backend):
    """One device writes it, two ranks read and write it, and one device reads that."""
    first, second, third = (new(tmp_path / name) for name in ("first", "second", "third"))
    published = carry_on(ONE_DEVICE, folder, "", first, 2)
    assert worlds[2].call(carry_on, Sharding(TWO, backend), folder, first, second, 0)[0] == published
    assert carry_on(ONE_DEVICE, folder, second, third, 0) == published
    assert tensors_of(Path(first)) == tensors_of(Path(second)) == tensors_of(Path(third))


def test_a_checkpoint_of_bfloat16_weights_becomes_masters_of_their_values(folder: str, tmp_path: Path):
    """As versions before master weights wrote them."""
    policy = policy_at(ONE_DEVICE, folder)
    policy.update(own_rows(policy))
    policy.save(new(tmp_path / "older"))
    (saved,) = (tmp_path / "older").glob("*.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in load_file(saved).items()}
    save_file(halves, saved)
    policy.load(str(tmp_path / "older"))
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in masters(policy).items())
    policy.update(own_rows(policy))
