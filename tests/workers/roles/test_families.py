"""Every family runs in every role on one device and on fully sharded ranks, adapters included.

A family is a small random model of it (tests/families.py); one step of GRPO, of a critic, and the scores of a reward.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors import safe_open
from torch import Tensor

from protocols.data.columns import take
from protocols.data.messages import Experience
from protocols.layout.topology import Topology
from protocols.layout.transfer import protocol
from protocols.weights import Version
from tests import families
from tests.workers.batches import VOCABULARY, experience, rollouts
from workers.data.vocabulary import Vocabulary
from workers.generation.packed import received
from workers.generation.torch import TorchEngine
from workers.parallel.merged import merged
from workers.parallel.sharding import ONE_DEVICE, Sharding
from workers.roles.critic import CriticWorker
from workers.roles.policy import PolicyWorker
from workers.roles.reference import ReferenceWorker
from workers.roles.reward import RewardWorker
from workers.settings import Generation, Lora, Loss, Model, Optimizer
from workers.training.models import load_causal, load_critic, load_reward

ROWS = 4
SHARDED = Sharding(Topology(1, 1, 2), "fsdp")
# Adam turns the rounding of a gradient near zero into a full step; a large epsilon makes it behave like SGD.
OPTIMIZER = Optimizer(epsilon=1.0, gradient_clip=0.1)
LOSS = Loss(mini_batches=2, tokens_per_micro_batch=60)
GENERATION = Generation(engine="torch")
WHOLE, LORA = Lora(), Lora(rank=2, alpha=8.0)
# One of each kind: transposed layers and tied embeddings, learned positions and no class for a head, layers of two
# kinds, fused projections and rotary factors that depend on the context, experts.
KINDS = ("gpt2", "opt", "gemma3", "phi3", "qwen3_moe")
each_kind = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    return {family: str(families.make(family, root / family, vocabulary=VOCABULARY)) for family in families.CONFIGS}


class Step(NamedTuple):
    """A rank's results of one step, of which every rank of these topologies has its own rows'."""

    reference: np.ndarray
    log_probs: np.ndarray  # of the policy after its step
    adapted: np.ndarray  # of the policy that trains adapters, after its step
    values: np.ndarray
    scores: np.ndarray
    weights: dict[str, Tensor]  # of policy and adapted policy, on rank 0


def policy_at(folder: str, lora: Lora = WHOLE, sharding: Sharding = ONE_DEVICE) -> PolicyWorker:
    return PolicyWorker(
        Model(path=folder, learning_rate=0.1, lora=lora), LOSS, OPTIMIZER, GENERATION, seed=3, sharding=sharding
    )


def critic_at(folder: str, sharding: Sharding = ONE_DEVICE) -> CriticWorker:
    return CriticWorker(Model(path=folder, learning_rate=0.1), LOSS, OPTIMIZER, seed=3, sharding=sharding)


def reward_at(folder: str, sharding: Sharding = ONE_DEVICE) -> RewardWorker:
    return RewardWorker(Model(path=folder), 60, sharding=sharding)


def one_step(sharding: Sharding, folder: str, reward_folder: str) -> Step:
    policy, adapted = policy_at(folder, sharding=sharding), policy_at(folder, LORA, sharding)
    reference = ReferenceWorker(Model(path=folder), LOSS, GENERATION, sharding=sharding)
    critic, reward = critic_at(folder, sharding), reward_at(reward_folder, sharding)
    parts = protocol("METRIC").distribute(rows=ROWS, topology=sharding.topology)
    data: Experience = take(experience(ROWS), parts[policy.model.rank])
    rows = rollouts(data)
    log_probs = [reference.log_probs(rows).log_probs.values]
    weights: dict[str, Tensor] = {}
    for worker in (policy, adapted):
        worker.update(data)
        log_probs.append(worker.log_probs(rows).log_probs.values)
        with merged(worker.model):
            weights |= {f"{len(log_probs)}.{name}": t.clone() for name, t in worker.trained.collect().items()}
    critic.update(data)
    values, scores = critic.values(rows).values.values, reward.score(rows).batch.scores
    return Step(log_probs[0], log_probs[1], log_probs[2], values, scores, weights)


@pytest.fixture(scope="module")
def rewards(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reward model of each family: a language model's body with a new head, as `asyncflow reward-model` begins."""
    root = tmp_path_factory.mktemp("rewards")
    for family, folder in folders.items():
        load_reward(folder, seed=5).save_pretrained(str(root / family))
    return {family: str(root / family) for family in folders}


@cache
def alone(folder: str, reward_folder: str) -> Step:
    return one_step(ONE_DEVICE, folder, reward_folder)


def names_of(folder: str) -> set[str]:
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_step_on_fully_sharded_ranks_is_that_of_one_device(worlds, folders, rewards, family: str):
    ours = worlds[2].call(one_step, SHARDED, folders[family], rewards[family])
    theirs = alone(folders[family], rewards[family])
    for field in Step._fields[:-1]:
        joined = np.concatenate([getattr(step, field) for step in ours])
        np.testing.assert_allclose(joined, getattr(theirs, field), atol=1e-5, err_msg=field)
    assert ours[0].weights.keys() == theirs.weights.keys()
    assert max(float((ours[0].weights[n] - theirs.weights[n]).abs().max()) for n in theirs.weights) < 2e-6
    assert np.abs(theirs.log_probs - theirs.reference).max() > 1e-3
    assert np.abs(theirs.adapted - theirs.reference).max() > 1e-4
    assert np.std(theirs.scores) > 0.01
    assert theirs.values.any()


@each_kind
@pytest.mark.parametrize("lora", [WHOLE, LORA, Lora(rank=2, publish="adapters")], ids=["full", "merged", "adapters"])
def test_a_publication_has_the_checkpoints_names_and_an_engine_proves_it(folders, family: str, lora: Lora):
    folder = folders[family]
    policy, engine = policy_at(folder, lora), TorchEngine(load_causal(folder), GENERATION, 3, Vocabulary.of(folder))
    policy.update(experience(ROWS))
    manifest, buffer = policy.snapshot(Version(0, 1))
    if lora.publish == "merged":
        assert {entry.name for entry in manifest.tensors} == names_of(folder)
    assert engine.load(received(manifest, buffer, Model(path=folder))).probe_difference < 1e-5


@each_kind
def test_what_each_role_exports_is_loaded_again(folders, rewards, tmp_path: Path, family: str):
    policy, critic = policy_at(folders[family]), critic_at(rewards[family])
    for worker in (policy, critic):
        worker.update(experience(ROWS))
    want = policy.log_probs(rollouts(experience(ROWS))), critic.values(rollouts(experience(ROWS)))
    policy.export(str(tmp_path / "policy"))
    critic.export(str(tmp_path / "critic"))
    assert names_of(str(tmp_path / "policy")) == names_of(folders[family])
    again = policy_at(str(tmp_path / "policy")), critic_at(str(tmp_path / "critic"))
    got = again[0].log_probs(rollouts(experience(ROWS))), again[1].values(rollouts(experience(ROWS)))
    np.testing.assert_array_equal(got[0].log_probs.values, want[0].log_probs.values)
    np.testing.assert_array_equal(got[1].values.values, want[1].values.values)


def test_a_family_without_a_class_for_it_gets_a_head_of_its_own(folders, rewards):
    assert type(load_critic(folders["opt"])).__name__ == "OPTForTokenClassification"
    assert "score.weight" in names_of(rewards["opt"])
