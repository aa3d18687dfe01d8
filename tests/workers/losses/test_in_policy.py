"""The losses in the policy's step on a real model: the gradient is the same for any micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch

from protocols.data.jagged import Array, Jagged
from protocols.data.messages import Experience
from tests import tiny
from tests.workers.gradients import Gradients, gradients_of
from workers.losses import POLICY_LOSSES
from workers.losses.tokens import Surrogate, Tokens
from workers.roles.policy import PolicyWorker
from workers.settings import Correction, Generation, Loss, Model, Optimizer
from workers.training.models import load_causal

ROWS = [("12+34=", "46"), ("7*", "7 is it"), ("what?", "no"), ("a", "b"), ("9-9=", "0 or so"), ("2+2=", "5")]
MASKS = [[1, 1], [1, 0, 1, 1, 0, 1, 1], [0, 0], [1], [1] * 7, [1]]  # the third row trains nothing
TEMPERATURE = 0.8
MICRO_BATCHES = (10_000, 30, 1)  # padded tokens: one micro-batch, three, and one for each of the six rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def batch(folder: Path) -> Experience:
    """Experience of an older policy: mu is the policy's own log-prob plus noise."""
    model, rng = load_causal(folder), np.random.default_rng(0)
    prompts = Jagged.from_rows([tiny.encode(p) for p, _ in ROWS], np.int32)
    responses = Jagged.from_rows([tiny.encode(r) for _, r in ROWS], np.int32)
    own = np.concatenate([tiny.log_probs(model, p, r, TEMPERATURE) for p, r in zip(prompts, responses, strict=True)])
    tokens = len(own)
    column = responses.with_values
    return Experience(
        sample_ids=np.arange(len(ROWS), dtype=np.int64),
        prompts=prompts,
        responses=responses,
        loss_mask=Jagged.from_rows(MASKS, np.uint8),
        log_probs=column((own + rng.normal(0, 0.4, tokens)).astype(np.float32)),
        advantages=column(rng.normal(size=tokens).astype(np.float32)),
        returns=column(np.zeros(tokens, np.float32)),
        values=column(np.zeros(tokens, np.float32)),
        reference=column((own + rng.normal(0, 0.4, tokens)).astype(np.float32)),
        cost_returns=column(np.zeros(tokens, np.float32)),
        cost_values=column(np.zeros(tokens, np.float32)),
    )


def worker(folder: Path, loss: Loss) -> PolicyWorker:
    model = Model(path=str(folder), learning_rate=1e-3)
    return PolicyWorker(model, loss, Optimizer(gradient_clip=0.0), Generation(temperature=TEMPERATURE), seed=3)


def step(folder: Path, batch: Experience, loss: Loss) -> tuple[dict[str, float], Gradients]:
    """The metrics of an update, and each parameter's gradient after the last micro-batch."""
    policy, metrics = worker(folder, loss), dict[str, float]()
    gradients = gradients_of(policy.model.module, lambda: metrics.update(policy.update(batch).values))
    return metrics, gradients


@pytest.mark.parametrize("correction", get_args(Correction))
@pytest.mark.parametrize("policy", POLICY_LOSSES)
def test_the_cut_into_micro_batches_changes_neither_measures_nor_gradient(
    folder: Path, batch: Experience, policy: str, correction: Correction
):
    (measured, gradients), *others = (
        step(
            folder,
            batch,
            Loss(
                policy=policy,
                correction=correction,
                tis_cap=1.2,
                sequence_high=1.3,
                entropy_coefficient=0.01,
                tokens_per_micro_batch=budget,
            ),
        )
        for budget in MICRO_BATCHES
    )
    assert any(gradient.any() for gradient in gradients.values())
    for again, theirs in others:
        assert again == pytest.approx(measured, rel=1e-4, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_entropy_bonus_widens_the_distribution(folder: Path, batch: Experience):
    def entropies(coefficient: float) -> list[float]:
        policy = worker(folder, Loss(entropy_coefficient=coefficient))
        return [policy.update(batch).values["entropy"] for _ in range(4)]

    wide, narrow = entropies(10.0), entropies(-10.0)
    assert wide[0] == narrow[0]
    assert wide[-1] > wide[0] > narrow[-1]


def test_log_probs_are_the_same_with_and_without_an_entropy_bonus(folder: Path, batch: Experience):
    with_bonus, without = (step(folder, batch, Loss(entropy_coefficient=c))[0] for c in (1e-12, 0.0))
    assert with_bonus["negative_log_likelihood"] == without["negative_log_likelihood"]


def test_a_step_reports_how_its_tokens_were_weighed(folder: Path, batch: Experience):
    measured = step(folder, batch, Loss(correction="tis", tis_cap=1.2))[0]
    assert 0 < measured["correction_truncated"] < 1
    assert measured["correction_weight"] < 1.2
    assert measured["ratio_max"] == pytest.approx(1)  # one optimizer step: theta is still prox
    assert measured["approximate_kl"] == pytest.approx(0, abs=1e-6)


def test_later_optimizer_steps_have_moved_from_the_start_of_the_step(folder: Path, batch: Experience):
    measured = step(folder, batch, Loss(epochs=3))[0]
    assert measured["ratio_max"] > 1
    assert measured["approximate_kl"] > 0


def halved(tokens: Tokens, loss: Loss) -> Surrogate:
    """A user's loss: half of REINFORCE."""
    return Surrogate(-0.5 * tokens.advantages * tokens.log_probs, torch.zeros_like(tokens.mask))


def test_a_users_own_loss_is_named_by_module_and_function(folder: Path, batch: Experience):
    _, whole = step(folder, batch, Loss(policy="reinforce"))
    _, half = step(folder, batch, Loss(policy=f"{__name__}:halved"))
    for name, gradient in half.items():
        torch.testing.assert_close(2 * gradient, whole[name])


def test_a_kl_term_in_the_loss_pulls_towards_the_reference(folder: Path, batch: Experience):
    """With zero advantages only the KL term is left; k2's gradient is that of half the squared distance."""
    idle = msgspec.structs.replace(batch, advantages=batch.advantages.with_values(0 * batch.advantages.values))
    measured, gradients = step(folder, idle, Loss(kl_coefficient=0.5, kl_estimator="k2"))
    policy = worker(folder, Loss())
    rows = zip(batch.prompts, batch.responses, batch.reference, batch.loss_mask, strict=True)
    distances = [
        (own_log_probs(policy, prompt, response) - torch.from_numpy(np.array(anchor)))[torch.from_numpy(mask != 0)]
        for prompt, response, anchor, mask in rows
    ]
    kl = 0.5 * torch.cat(distances).square().mean()
    (0.5 * kl).backward()
    assert measured["kl_reference"] == pytest.approx(kl.item(), rel=1e-4)
    for name, parameter in policy.model.module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-6, rtol=1e-3)


def own_log_probs(policy: PolicyWorker, prompt: Array, response: Array) -> torch.Tensor:
    """Log-probs of one response from a forward pass of its row alone, with gradient."""
    row = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logits = policy.model.module(input_ids=row).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None]).squeeze(-1)
