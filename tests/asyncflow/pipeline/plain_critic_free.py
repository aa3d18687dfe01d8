"""GRPO and ReMax as plain loops with their own formulas: the pipeline at staleness 0 must equal them bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from asyncflow.recipe.config import Recipe
from protocols.data.messages import Prompts
from tests.asyncflow.pipeline.plain_loop import (
    Batch,
    State,
    adamw,
    causal,
    descend,
    generate,
    log_probs_of,
    ppo_loss,
    prompt_source,
    reward_model,
    scores_of,
)


def grpo(recipe: Recipe) -> State:
    """The policy's weights after `recipe.steps` of GRPO."""
    run, samples = Run(recipe), recipe.samples_per_prompt
    for step, prompts in run.steps():
        batch, scores = run.answers(run.source.requests(prompts, samples, step), step)
        advantages = np.zeros(len(scores))
        for start in range(0, len(scores), samples):
            group = [float(s) for s in scores[start : start + samples]]
            mean = sum(group) / samples
            deviation = np.sqrt(sum((s - mean) ** 2 for s in group) / (samples - 1))
            advantages[start : start + samples] = [(s - mean) / (deviation + 1e-6) for s in group]
        flat = torch.from_numpy(np.repeat(advantages, batch.lengths).astype(np.float32))
        run.descend(grpo_loss(run.policy, batch, flat, run.anchor(batch)))
    return run.policy.state_dict()


def remax(recipe: Recipe) -> State:
    """The policy's weights after `recipe.steps` of ReMax."""
    run, samples = Run(recipe), recipe.samples_per_prompt
    beta = float(recipe.advantage["kl_coefficient"])
    for step, prompts in run.steps():
        batch, scores = run.answers(run.source.requests(prompts, samples, step), step)
        _, greedy = run.answers(run.source.baselines(prompts, step), step, temperature=0.0)
        ends = np.cumsum(batch.lengths)
        to_go = -beta * (batch.mu.astype(np.float64) - run.anchor(batch).numpy().astype(np.float64))
        to_go[ends - 1] += scores
        for start, end in zip(ends - batch.lengths, ends, strict=True):
            for t in range(end - 2, start - 1, -1):
                to_go[t] += to_go[t + 1]
        advantages = to_go - np.repeat(np.repeat(greedy.astype(np.float64), samples), batch.lengths)
        run.descend(ppo_loss(run.policy, batch, torch.from_numpy(advantages.astype(np.float32))))
    return run.policy.state_dict()


class Run:
    """The models of a recipe that has no critic, in one process."""

    def __init__(self, recipe: Recipe) -> None:
        torch.set_num_threads(1)
        self.policy = causal(recipe.models["policy"].path)
        self.source = prompt_source(recipe)
        self._reference = causal(recipe.models["reference"].path)
        self._reward = reward_model(recipe.models["reward"].path)
        self._optimizer = adamw(self.policy, recipe, "policy")
        self._recipe = recipe

    def steps(self) -> Iterator[tuple[int, list[int]]]:
        """Yield each step with its prompt ids, sorted."""
        count = self._recipe.prompts_per_step
        for step in range(self._recipe.steps):
            yield step, sorted(self.source.at(step * count + i) for i in range(count))

    def answers(self, requests: Prompts, step: int, temperature: float = 1.0) -> tuple[Batch, np.ndarray]:
        """The policy's responses and their scores."""
        batch = generate(self.policy, requests, self._recipe, step, temperature)
        with torch.no_grad():
            return batch, scores_of(self._reward, batch)

    def anchor(self, batch: Batch) -> torch.Tensor:
        """Log-probs under the reference."""
        with torch.no_grad():
            return log_probs_of(self._reference, batch)

    def descend(self, loss: torch.Tensor) -> None:
        descend(self.policy, self._optimizer, loss)


def grpo_loss(model: torch.nn.Module, batch: Batch, advantages: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Clipped ratio and 0.04 times k3: a mean over each row's tokens, then over rows."""
    model.train()
    log_probs = log_probs_of(model, batch)
    ratio = torch.exp(log_probs - log_probs.detach())
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    difference = anchor - log_probs
    loss = loss + 0.04 * (torch.expm1(difference) - difference)
    weights = np.repeat([1.0 / (len(batch.lengths) * n) for n in batch.lengths], batch.lengths)
    return (loss * torch.from_numpy(weights.astype(np.float32))).sum()
