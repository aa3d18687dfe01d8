"""Some steps of PPO with all models on one device, which computes the same as the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from protocols.data.messages import Experience, Rollouts, Scores
from protocols.roles import Sampling
from tests import tiny
from tests.gpu.conftest import Figure
from tests.workers.batches import VOCABULARY, experience, rollouts
from workers.advantages.gae import gae
from workers.parallel.sharding import Sharding
from workers.roles.cost import CostWorker
from workers.roles.critic import CostCriticWorker, CriticWorker
from workers.roles.policy import PolicyWorker
from workers.roles.reference import ReferenceWorker
from workers.roles.reward import RewardWorker
from workers.settings import Dtype, Generation, Lora, Loss, Model, Optimizer

STEPS = 3
GENERATION = Generation(engine="torch", slots=64)
TEXTS = ["12+34=", "7*", "what?", "sort: dcba"]
REWARDED = tiny.VOCABULARY["7"]  # the reward is the share of this token


class Models(NamedTuple):
    """The models of a run, on one device."""

    policy: PolicyWorker
    critic: CriticWorker
    reference: ReferenceWorker


def models_on(kind: str, folder: str, dtype: Dtype = "float32") -> Models:
    loss, optimizer, on = Loss(), Optimizer(epsilon=1e-3), Sharding(device=torch.device(kind))
    trained, frozen = Model(path=folder, learning_rate=1e-3, dtype=dtype), Model(path=folder, dtype=dtype)
    return Models(
        PolicyWorker(trained, loss, optimizer, GENERATION, 3, sharding=on),
        CriticWorker(trained, loss, optimizer, 3, sharding=on),
        ReferenceWorker(frozen, loss, GENERATION, sharding=on),
    )


def ppo_step(models: Models, epoch: int) -> tuple[Rollouts, Mapping[str, float]]:
    """Generate, score, estimate advantages and train both models. Returns the rollouts and the policy's metrics."""
    prompts = tiny.make_prompts(TEXTS, samples=8, epoch=epoch)
    generated = models.policy.generate(prompts, sampling=Sampling(max_tokens=16)).batch
    shares = np.array([np.mean(np.asarray(response) == REWARDED) for response in generated.responses], np.float32)
    values, reference = models.critic.values(generated), models.reference.log_probs(generated)
    estimated = gae(generated, reference, values, Scores(sample_ids=generated.sample_ids, scores=shares))
    batch: Experience = estimated.batch
    models.critic.update(batch)
    metrics = models.policy.update(batch)
    return generated, metrics.values


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Language models of a family with a sharding plan and of one without, and a reward model."""
    qwen2 = tiny.config()
    qwen2.vocab_size, qwen2.num_labels = VOCABULARY, 1
    gpt2 = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=None, eos_token_id=tiny.EOS_ID, pad_token_id=tiny.PAD_ID,
    )  # fmt: skip
    kinds = (("qwen2", Qwen2ForCausalLM, qwen2), ("gpt2", GPT2LMHeadModel, gpt2))
    made: dict[str, str] = {}
    for name, make, config in (*kinds, ("reward", Qwen2ForSequenceClassification, qwen2)):
        torch.manual_seed(0)
        made[name] = str(tmp_path_factory.mktemp(name))
        make(config).save_pretrained(made[name])
        tiny.tokenizer().save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def folder(folders: dict[str, str]) -> str:
    return folders["qwen2"]


def test_log_probs_and_a_step_are_those_of_the_cpu(kind: str, folder: str):
    data, seen = experience(7), []
    for device in (kind, "cpu"):
        policy = models_on(device, folder).policy
        before = policy.log_probs(rollouts(data))
        metrics = policy.update(data)
        seen.append((before.log_probs.values, metrics.values))
    (ours, measured), (theirs, expected) = seen
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_takes_a_few_steps(kind: str, dtype: Dtype, folder: str, figure: Figure):
    models = models_on(kind, folder, dtype)
    started, tokens = time.perf_counter(), 0
    for step in range(STEPS):
        generated, measured = ppo_step(models, step)
        tokens += len(generated.responses.values)
        assert set(generated.versions.values.tolist()) == {step}
        assert math.isfinite(measured["loss"]) and measured["gradient_norm"] > 0.0
    assert models.policy.trained.version == models.critic.trained.version == STEPS
    figure(f"PPO in {dtype} on {kind}: generated and trained", tokens / (time.perf_counter() - started), "tokens/s")


@pytest.mark.parametrize("role", ["policy", "adapters", "gpt2", "critic", "cost_critic", "reference", "reward", "cost"])
def test_every_role_computes_what_the_cpu_does(kind: str, folders: dict[str, str], role: str):
    """In float32: outputs to 1e-4, metrics to a relative 1e-3."""
    (ours, measured), (theirs, expected) = (computed(role, folders, torch.device(device)) for device in (kind, "cpu"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-5)


def computed(role: str, folders: dict[str, str], device: torch.device) -> tuple[np.ndarray, Mapping[str, float]]:
    """A role's outputs, after a step if it trains, and the metrics of that step."""
    on, loss, optimizer, data = Sharding(device=device), Loss(), Optimizer(epsilon=1e-3), experience(7)
    trained, reward = Model(path=folders["qwen2"], learning_rate=1e-3), Model(path=folders["reward"])
    match role:
        case "policy" | "adapters" | "gpt2":
            lora = Lora(rank=4 if role == "adapters" else 0)
            model = Model(path=folders["gpt2" if role == "gpt2" else "qwen2"], learning_rate=1e-3, lora=lora)
            policy = PolicyWorker(model, loss, optimizer, GENERATION, 3, sharding=on)
            metrics = policy.update(data).values
            greedy = policy.generate(tiny.make_prompts(TEXTS), sampling=Sampling(max_tokens=8, temperature=0.0)).batch
            assert set(greedy.versions.values.tolist()) == {1}
            return policy.log_probs(rollouts(data)).log_probs.values, metrics
        case "critic" | "cost_critic":
            kind = CriticWorker if role == "critic" else CostCriticWorker
            critic = kind(trained, loss, optimizer, 3, sharding=on)
            metrics = critic.update(data).values
            return critic.values(rollouts(data)).values.values, metrics
        case "reference":
            return ReferenceWorker(trained, loss, GENERATION, sharding=on).log_probs(
                rollouts(data)
            ).log_probs.values, {}
        case "reward":
            return RewardWorker(reward, 200, sharding=on).score(rollouts(data)).batch.scores, {}
        case _:
            return CostWorker(reward, 200, sharding=on).score(rollouts(data)).batch.costs, {}
