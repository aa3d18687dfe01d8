"""The critic's step has the gradient of its formula for any micro-batches, and is taken completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch

from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, Rollouts
from tests import tiny
from tests.workers.checkpoints import contents
from tests.workers.gradients import FIXED_LENGTH, aggregated, gradients_of
from workers.roles.critic import CostCriticWorker, CriticWorker
from workers.settings import Aggregation, Loss, Model, Optimizer
from workers.training.models import load_critic
from workers.training.optimizer_step import StepRefused

ROWS = [("12+34=", "46"), ("7*", "7 is it"), ("what?", "no"), ("a", "b"), ("9-9=", "0 or so"), ("2+2=", "5")]
MASKS = [[1, 1], [1, 0, 1, 1, 0, 1, 1], [0, 0], [1], [1] * 7, [1]]  # the third row trains nothing
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
CLIP = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_reward(tmp_path_factory.mktemp("reward"))  # its head is not zero, so values differ from each other


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    responses = Jagged.from_rows([tiny.encode(r) for _, r in ROWS], np.int32)
    tokens = len(responses.values)
    return Rollouts(
        sample_ids=np.arange(70, 70 + len(ROWS), dtype=np.int64),
        prompts=Jagged.from_rows([tiny.encode(p) for p, _ in ROWS], np.int32),
        references=Jagged.from_texts([""] * len(ROWS)),
        responses=responses,
        log_probs=responses.with_values(np.full(tokens, -1, np.float32)),
        versions=responses.with_values(np.zeros(tokens, np.int32)),
        loss_mask=Jagged.from_rows(MASKS, np.uint8),
        finishes=np.zeros(len(ROWS), np.uint8),
    )


@pytest.fixture(scope="module")
def batch(folder: Path, rollouts: Rollouts) -> Experience:
    """Experience with an older critic's values, near this one's, so that some tokens are clipped."""
    rng, own = np.random.default_rng(0), worker(folder).values(rollouts).values
    tokens = len(own.values)
    return Experience(
        sample_ids=rollouts.sample_ids,
        prompts=rollouts.prompts,
        responses=rollouts.responses,
        loss_mask=rollouts.loss_mask,
        log_probs=rollouts.log_probs,
        advantages=own.with_values(np.zeros(tokens, np.float32)),
        returns=own.with_values(rng.normal(size=tokens).astype(np.float32)),
        values=own.with_values((own.values + rng.normal(0, 2 * CLIP, tokens)).astype(np.float32)),
        reference=rollouts.log_probs,
        cost_returns=own.with_values(rng.normal(size=tokens).astype(np.float32)),
        cost_values=own,
    )


def worker(folder: Path, loss: Loss | None = None, rate: float = 1e-3) -> CriticWorker:
    model = Model(path=str(folder), learning_rate=rate)
    return CriticWorker(model, loss or Loss(), Optimizer(gradient_clip=0.0), seed=3)


def row_values(model: torch.nn.Module, batch: Experience | Rollouts, row: int) -> torch.Tensor:
    """The values of one row from an unpadded forward pass, with gradient."""
    prompt, tokens = batch.prompts[row], np.concatenate([batch.prompts[row], batch.responses[row]])
    return model(input_ids=torch.from_numpy(tokens[None].astype(np.int64))).logits[0, len(prompt) - 1 : -1, 0]


def plain_loss(model: torch.nn.Module, batch: Experience, how: Aggregation) -> torch.Tensor:
    """The clipped squared error, averaged by the definition of the aggregation."""
    rows = []
    for row in range(len(batch)):
        inside = torch.from_numpy(batch.loss_mask[row].astype(bool))
        value, old, target = (
            row_values(model, batch, row),
            torch.tensor(batch.values[row]),
            torch.tensor(batch.returns[row]),
        )
        near = torch.maximum(torch.minimum(value, old + CLIP), old - CLIP)
        if inside.any():
            rows.append(0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2)[inside])
    return aggregated(rows, how)


def saved(critic: CriticWorker, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    critic.save(str(folder))
    return contents(folder)


@torch.no_grad()
def test_values_stand_before_each_token_and_carry_the_weights_version(folder: Path, rollouts: Rollouts):
    critic = worker(folder)
    critic.trained.version = 4
    values = critic.values(rollouts)
    values.check()
    assert values.versions.tolist() == [4] * len(ROWS)
    for row in range(len(ROWS)):
        np.testing.assert_allclose(values.values[row], row_values(critic.model.module, rollouts, row), atol=1e-5)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("budget", [10_000, 30, 1])
def test_the_gradient_is_the_formulas_for_every_aggregation_and_cut(
    folder: Path, batch: Experience, how: Aggregation, budget: int
):
    plain = load_critic(folder)
    loss = plain_loss(plain, batch, how)
    want = gradients_of(plain, loss.backward)
    critic = worker(
        folder, Loss(value_clip=CLIP, aggregation=how, fixed_length=FIXED_LENGTH, tokens_per_micro_batch=budget)
    )
    measured = {}
    got = gradients_of(critic.model.module, lambda: measured.update(critic.update(batch).values))
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = float(torch.stack([gradient.norm() for gradient in want.values()]).norm())
    assert measured["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_it_learns_the_returns(folder: Path, batch: Experience):
    critic = worker(folder, Loss(value_clip=0.0, epochs=20), rate=3e-3)
    first = critic.update(batch).values["loss"]
    assert critic.update(batch).values["loss"] < 0.1 * first
    assert critic.trained.version == 2


def test_a_critic_of_costs_learns_the_costs_returns(folder: Path, tmp_path: Path, batch: Experience):
    loss, model = Loss(value_clip=CLIP), Model(path=str(folder), learning_rate=1e-3)
    of_costs = CostCriticWorker(model, loss, Optimizer(gradient_clip=0.0), seed=3)
    as_returns = msgspec.structs.replace(batch, returns=batch.cost_returns, values=batch.cost_values)
    plain = worker(folder, loss)
    assert of_costs.update(batch) == plain.update(as_returns)
    assert saved(of_costs, tmp_path / "costs") == saved(plain, tmp_path / "plain")


@pytest.mark.parametrize("loss", [Loss(tokens_per_micro_batch=1), Loss(epochs=2, mini_batches=3)])
def test_a_refused_step_changes_nothing_and_poisons_nothing(
    folder: Path, tmp_path: Path, batch: Experience, loss: Loss
):
    critic, untouched = worker(folder, loss), worker(folder, loss)
    for each in (critic, untouched):
        each.update(batch)
    before = saved(critic, tmp_path / "before")
    poisoned = batch.returns.values.copy()
    poisoned[-1] = np.nan  # the last row, after earlier micro-batches have added their gradients
    with pytest.raises(StepRefused, match=r"critic\.update of batch of \d samples \(.*7\d.*\): loss is nan"):
        critic.update(msgspec.structs.replace(batch, returns=batch.returns.with_values(poisoned)))
    assert saved(critic, tmp_path / "after") == before
    assert (critic.trained.version, critic.model.module.training) == (1, False)
    for each in (critic, untouched):
        each.update(batch)
    assert saved(critic, tmp_path / "next") == saved(untouched, tmp_path / "untouched")


def test_a_loaded_critic_goes_on_like_one_that_never_stopped(folder: Path, tmp_path: Path, batch: Experience):
    critic, loaded = worker(folder), worker(folder)
    critic.update(batch)
    saved(critic, tmp_path / "stop")
    loaded.load(str(tmp_path / "stop"))
    for each in (critic, loaded):
        each.update(batch)
        each.update(batch)
    assert saved(loaded, tmp_path / "loaded") == saved(critic, tmp_path / "never stopped")
