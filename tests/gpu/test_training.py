"""A few steps of PPO on a device: policy, critic and reference live there, and its numbers are the CPU's."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from protocols.data.messages import Experience, Rollouts, Scores
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.roles import Sampling
from tests import tiny
from tests.gpu.conftest import Figure
from tests.workers.batches import VOCABULARY, experience, rollouts
from workers.advantages.gae import gae
from workers.roles.parallel_answers import ParallelReference
from workers.roles.parallel_critic import ParallelCritic
from workers.roles.parallel_policy import ParallelPolicy
from workers.settings import Dtype, Generation, Loss, Model, Optimizer

STEPS = 3
GENERATION = Generation(engine="torch", slots=64)
TEXTS = ["12+34=", "7*", "what?", "sort: dcba"]
LIKED = tiny.VOCABULARY["7"]  # the reward is the share of this token


class Models(NamedTuple):
    """The roles of a run, on one device."""

    policy: ParallelPolicy
    critic: ParallelCritic
    reference: ParallelReference


def models_on(kind: str, folder: str, dtype: Dtype = "float32") -> Models:
    loss, optimizer, device = Loss(), Optimizer(epsilon=1e-3), torch.device(kind)
    trained, frozen = Model(path=folder, learning_rate=1e-3, dtype=dtype), Model(path=folder, dtype=dtype)
    at, grouping = Topology(), GenerationGrouping(Topology())
    return Models(
        ParallelPolicy(trained, at, loss, optimizer, GENERATION, 3, grouping=grouping, device=device),
        ParallelCritic(trained, at, loss, optimizer, 3, device=device),
        ParallelReference(frozen, at, loss, GENERATION, device=device),
    )


def ppo_step(models: Models, epoch: int) -> tuple[Rollouts, Mapping[str, float]]:
    """Draw, score, estimate, train both: what was drawn, and the policy's measures."""
    prompts = tiny.make_prompts(TEXTS, samples=8, epoch=epoch)
    answer = models.policy.generate(prompts, sampling=Sampling(max_tokens=16))
    assert answer
    drawn = answer.batch
    shares = np.array([np.mean(np.asarray(response) == LIKED) for response in drawn.responses], np.float32)
    values, reference = models.critic.values(drawn), models.reference.log_probs(drawn)
    assert values and reference
    estimated = gae(drawn, reference, values, Scores(sample_ids=drawn.sample_ids, scores=shares))
    batch: Experience = estimated.batch
    models.critic.update(batch)
    metrics = models.policy.update(batch)
    assert metrics
    return drawn, metrics.values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny.config()
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("policy"))
    Qwen2ForCausalLM(config).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_log_probs_and_a_step_are_those_of_the_cpu(kind: str, folder: str):
    data, seen = experience(7), []
    for device in (kind, "cpu"):
        policy = models_on(device, folder).policy
        before = policy.log_probs(rollouts(data))
        metrics = policy.update(data)
        assert before and metrics
        seen.append((before.log_probs.values, metrics.values))
    (ours, measured), (theirs, expected) = seen
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_takes_a_few_steps(kind: str, dtype: Dtype, folder: str, figure: Figure):
    models = models_on(kind, folder, dtype)
    started, tokens = time.perf_counter(), 0
    for step in range(STEPS):
        drawn, measured = ppo_step(models, step)
        tokens += len(drawn.responses.values)
        assert set(drawn.versions.values.tolist()) == {step}
        assert math.isfinite(measured["loss"]) and measured["gradient_norm"] > 0.0
    assert models.policy.trained.version == models.critic.trained.version == STEPS
    figure(f"PPO in {dtype} on {kind}: drawn and trained", tokens / (time.perf_counter() - started), "tokens/s")
