"""PPO as one plain loop over transformers models: no services, no channels, no batcher, no ledger.

At staleness 0 the pipeline must equal it bit for bit. The formulas are implemented independently; only the torch engine
that samples and the order of the data are shared with the pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.recipe.config import Recipe
from protocols.data.messages import Prompts
from protocols.roles import Sampling
from protocols.weights import Version
from tests import tiny
from workers.generation.torch import TorchEngine

State = dict[str, torch.Tensor]
FUSED = {"attn_implementation": "sdpa", "dtype": torch.float32}


def train(recipe: Recipe) -> tuple[State, State]:
    """Train for `recipe.steps` steps, and return the final weights of policy and critic."""
    torch.set_num_threads(1)
    paths = {role: recipe.models[role].path for role in ("policy", "critic", "reference", "reward")}
    policy, reference = causal(paths["policy"]), causal(paths["reference"])
    reward = reward_model(paths["reward"])
    config = AutoConfig.from_pretrained(paths["critic"])
    config.num_labels, config.classifier_dropout = 1, 0.0
    critic = AutoModelForTokenClassification.from_pretrained(paths["critic"], config=config, **FUSED).eval()
    for parameter in critic.score.parameters():
        torch.nn.init.zeros_(parameter)
    optimizers = [adamw(model, recipe, role) for role, model in (("policy", policy), ("critic", critic))]
    source = prompt_source(recipe)
    cursor = 0
    for step in range(recipe.steps):
        prompts = [source.at(cursor + i) for i in range(recipe.prompts_per_step)]
        cursor += recipe.prompts_per_step
        batch = generate(policy, source.requests(sorted(prompts), recipe.samples_per_prompt, step), recipe, step)
        with torch.no_grad():
            anchor = log_probs_of(reference, batch)
            values = _values(critic, batch)
            scores = scores_of(reward, batch)
        advantages, returns = _advantages(batch, anchor, values, scores, recipe)
        descend(critic, optimizers[1], _critic_loss(critic, batch, values, returns))
        descend(policy, optimizers[0], ppo_loss(policy, batch, advantages))
    return policy.state_dict(), critic.state_dict()


class Batch:
    """Generated rows, right-padded: tokens [N, L], and the position of each response token."""

    def __init__(self, rows: list[tuple[list[int], list[int], list[float]]]) -> None:
        width = max(len(p) + len(r) for p, r, _ in rows)
        self.tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (prompt, response, _) in enumerate(rows):
            full = prompt + response
            self.tokens[i, : len(full)] = torch.tensor(full)
        self.at = [(i, len(p) + t) for i, (p, r, _) in enumerate(rows) for t in range(len(r))]
        self.lengths = [len(r) for _, r, _ in rows]
        self.ends = [len(p) + len(r) - 1 for p, r, _ in rows]
        self.mu = np.array([x for _, _, log_probs in rows for x in log_probs], np.float32)


def prompt_source(recipe: Recipe) -> PromptSource:
    assert isinstance(recipe.data.train, str)
    lines = Path(recipe.data.train).read_text().splitlines()
    rows = [msgspec.json.decode(line, type=DataRow) for line in lines]
    return PromptSource(rows, recipe.models["policy"].path, recipe.seed)


def causal(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **FUSED).eval()


def reward_model(path: str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **FUSED).eval()


def adamw(model: torch.nn.Module, recipe: Recipe, role: str) -> torch.optim.Optimizer:
    rate = recipe.models[role].learning_rate
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, foreach=False)


def generate(policy: PreTrainedModel, requests: Prompts, recipe: Recipe, step: int, temperature: float = 1.0) -> Batch:
    engine = TorchEngine(
        policy, recipe.generation, recipe.seed, tiny.TOKENS, owns_model=False, version=Version(0, step)
    )
    engine.submit(requests, Sampling(max_tokens=recipe.generation.max_tokens, temperature=temperature))
    generated = {}
    while engine.unfinished:
        generated |= {row.sample_id: row for row in engine.step()}
    rows = [generated[s] for s in requests.sample_ids.tolist()]
    return Batch(
        [(p.tolist(), r.tokens.tolist(), r.log_probs.tolist()) for p, r in zip(requests.prompts, rows, strict=True)]
    )


def _before(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    rows = torch.tensor([i for i, _ in batch.at])
    columns = torch.tensor([t - 1 for _, t in batch.at])
    return outputs[rows, columns]


def log_probs_of(model: Any, batch: Batch) -> torch.Tensor:
    """From logits of the positions before response tokens alone: others could change the rounding."""
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(_before(hidden, batch)).float()
    tokens = torch.tensor([batch.tokens[i, t] for i, t in batch.at])
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def _values(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.tokens, use_cache=False).logits
    return _before(logits, batch).float().squeeze(-1)


def scores_of(model: Any, batch: Batch) -> np.ndarray:
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return model.score(hidden[torch.arange(len(batch.ends)), torch.tensor(batch.ends)]).float().squeeze(-1).numpy()


def _advantages(
    batch: Batch, anchor: torch.Tensor, values: torch.Tensor, scores: np.ndarray, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    beta, decay = float(recipe.advantage["kl_coefficient"]), float(recipe.advantage["gae_lambda"])
    rewards = -beta * (batch.mu.astype(np.float64) - anchor.numpy().astype(np.float64))
    ends = np.cumsum(batch.lengths)
    rewards[ends - 1] += scores
    rewards = rewards.astype(np.float64)
    value = values.numpy().astype(np.float64)
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    for start, end in zip(ends - batch.lengths, ends, strict=True):
        carried, after = 0.0, 0.0
        for t in range(end - 1, start - 1, -1):
            carried = rewards[t] + 1.0 * after - value[t] + 1.0 * decay * carried
            after = value[t]
            advantages[t], returns[t] = carried, carried + value[t]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return torch.from_numpy(advantages.astype(np.float32)), torch.from_numpy(returns.astype(np.float32))


def ppo_loss(model: torch.nn.Module, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
    model.train()
    log_probs = log_probs_of(model, batch)
    ratio = torch.exp(log_probs - log_probs.detach())
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    loss = torch.where(advantages < 0, torch.minimum(loss, -3.0 * advantages), loss)
    return (loss * torch.tensor(1.0 / len(batch.at), dtype=torch.float32)).sum()


def _critic_loss(model: torch.nn.Module, batch: Batch, old: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    model.train()
    values = _values(model, batch)
    clipped = old + (values - old).clamp(-0.2, 0.2)
    loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return (loss * torch.tensor(1.0 / len(batch.at), dtype=torch.float32)).sum()


def descend(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
