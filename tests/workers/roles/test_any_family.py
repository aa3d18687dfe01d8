"""Fully sharded ranks compute what one device does, for a family without a sharding plan and for adapters."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

from protocols.data.columns import take
from protocols.data.messages import Experience
from protocols.layout.topology import Backend, Topology
from protocols.layout.transfer import protocol
from protocols.weights import Version
from tests import families, tiny
from tests.workers.batches import VOCABULARY, experience, rollouts
from tests.workers.checkpoints import contents
from tests.workers.ranks import RankFailed
from workers.parallel.merged import merged
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.roles.critic import CriticWorker
from workers.roles.policy import PolicyWorker
from workers.roles.reference import ReferenceWorker
from workers.settings import Generation, Lora, Loss, Model, Optimizer

BACKENDS: list[Backend] = ["fsdp", "zero1", "zero2"]
TWO = Topology(1, 1, 2)
ROWS = 7  # four and three on two replicas
# Adam turns the rounding of a gradient near zero into a full step; a large epsilon makes it behave like SGD.
OPTIMIZER = Optimizer(epsilon=1.0, gradient_clip=0.1)
LOSS = Loss(epochs=2, mini_batches=2, tokens_per_micro_batch=40)
GENERATION = Generation(engine="torch", temperature=0.8)
LORA = Lora(rank=4, alpha=12.0)


class PpoStep(NamedTuple):
    """A rank's results of one step of policy and critic; None where its results are not collected."""

    log_probs: list[Any]  # of the policy, of the reference, and of the policy after the step
    values: np.ndarray | None
    policy: dict[str, Tensor]  # on rank 0
    critic: dict[str, Tensor]
    probe: list[list[float]] | None


def model_at(folder: str, lora: Lora) -> Model:
    return Model(path=folder, learning_rate=0.1, lora=lora, head_chunk=5)  # a micro-batch has more response tokens


def policy_at(sharding: Sharding, folder: str, lora: Lora) -> PolicyWorker:
    return PolicyWorker(model_at(folder, lora), LOSS, OPTIMIZER, GENERATION, seed=3, sharding=sharding)


def own_rows(sharding: Sharding, rank: int) -> Experience:
    """The rows that a service would send to this rank."""
    return take(experience(ROWS), protocol("METRIC").distribute(rows=ROWS, topology=sharding.topology)[rank])


def ppo_step(sharding: Sharding, folder: str, lora: Lora) -> PpoStep:
    policy = policy_at(sharding, folder, lora)
    critic = CriticWorker(Model(path=folder, learning_rate=0.1), LOSS, OPTIMIZER, seed=3, sharding=sharding)
    reference = ReferenceWorker(Model(path=folder), LOSS, GENERATION, sharding=sharding)
    data = own_rows(sharding, policy.model.rank)
    given = [policy.log_probs(rollouts(data)), reference.log_probs(rollouts(data))]
    critic.update(data)
    policy.update(data)
    given.append(policy.log_probs(rollouts(data)))
    values, taken = critic.values(rollouts(data)), policy.snapshot(Version(0, 1))
    with merged(policy.model):
        weights = {name: tensor.clone() for name, tensor in policy.trained.collect().items()}
    return PpoStep(
        [each.log_probs.values if each else None for each in given],
        values.values.values if values else None,
        weights,
        critic.trained.collect(),
        taken.manifest.probe.log_probs if taken and taken.manifest.probe else None,
    )


@cache
def alone(folder: str, rank: int) -> PpoStep:
    return ppo_step(ONE_DEVICE, folder, LORA if rank else Lora())


def saved_again(sharding: Sharding, folder: str, lora: Lora, came: str, goes: str) -> None:
    """Save a checkpoint: after loading `came`, or after a step if `came` is empty."""
    policy = policy_at(sharding, folder, lora)
    if came:
        policy.load(came)
    else:
        policy.update(own_rows(sharding, policy.model.rank))
    policy.save(goes)


def cut(sharding: Sharding, folder: str) -> None:
    policy_at(sharding, folder, Lora())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    made = {"gpt2": tiny.make_gpt2, "qwen2": tiny.make_policy, "qwen3_moe": partial(families.make, "qwen3_moe")}
    return {name: str(make(root / name, vocabulary=VOCABULARY)) for name, make in made.items()}


CASES = [("gpt2", Lora()), ("gpt2", LORA), ("qwen2", LORA), ("qwen3_moe", LORA)]
each_case = pytest.mark.parametrize(("family", "lora"), CASES, ids=["gpt2", "gpt2-lora", "qwen2-lora", "moe-lora"])


@each_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ppo_step_on_sharded_ranks_is_that_of_one_device(worlds, folders, backend: Backend, family: str, lora: Lora):
    folder = folders[family]
    first, second = worlds[2].call(ppo_step, Sharding(TWO, backend), folder, lora)
    theirs = alone(folder, lora.rank)
    for ours, expected in ((first.policy, theirs.policy), (first.critic, theirs.critic)):
        assert ours.keys() == expected.keys()
        assert max(float((ours[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    for ours in zip(first.log_probs, second.log_probs, theirs.log_probs, strict=True):
        np.testing.assert_allclose(np.concatenate(ours[:2]), ours[2], atol=1e-5)
    assert first.values is not None and second.values is not None and theirs.values is not None
    np.testing.assert_allclose(np.concatenate([first.values, second.values]), theirs.values, atol=1e-5)
    assert first.probe is not None and theirs.probe is not None
    np.testing.assert_allclose(first.probe, theirs.probe, atol=1e-5)


@each_case
def test_a_checkpoint_goes_from_sharded_ranks_to_one_device_and_back(
    worlds, folders, tmp_path: Path, family: str, lora: Lora
):
    """Weights and moments stay equal bit by bit."""
    folder, sharded = folders[family], Sharding(TWO, "fsdp")
    places = [tmp_path / name for name in ("first", "second", "third")]
    for place in places:
        place.mkdir()
    first, second, third = map(str, places)
    worlds[2].call(saved_again, sharded, folder, lora, "", first)
    saved_again(ONE_DEVICE, folder, lora, first, second)
    worlds[2].call(saved_again, sharded, folder, lora, second, third)
    states = [{name: data for name, data in contents(place).items() if "trainer.json" not in name} for place in places]
    assert len(states[0]) > 10
    assert any("exp_avg_sq" in name for name in states[0])
    assert states[0] == states[1] == states[2]


def test_a_family_without_a_plan_is_not_cut(worlds, folders):
    with pytest.raises(RankFailed, match="model_type 'gpt2' has no sharding plan: one of llama"):
        worlds[2].call(cut, Sharding(Topology(1, 2, 1)), folders["gpt2"])
