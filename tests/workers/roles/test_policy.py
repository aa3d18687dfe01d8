"""The policy's step: the gradient that the formula says however the batch is cut, all of it or none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
import torch

from protocols.data.columns import Jagged, take
from protocols.data.messages import Experience, Rollouts
from protocols.weights import Version, digest, verify
from tests import tiny
from tests.workers.checkpoints import contents
from workers.roles.policy import PolicyWorker
from workers.settings import Aggregation, Generation, Loss, Model, Optimizer
from workers.training.micro_batches import micro_batches
from workers.training.mini_batches import mini_batches
from workers.training.models import load_causal
from workers.training.optimizer_step import StepRefused

TEMPERATURE = 0.8
ROWS = [("12+34=", "46"), ("7*", "7 is it"), ("what?", "no"), ("a", "b"), ("9-9=", "0 or so"), ("2+2=", "5")]
MASKS = [[1, 1], [1, 0, 1, 1, 0, 1, 1], [0, 0], [1], [1] * 7, [1]]  # the third row trains nothing
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
FIXED_LENGTH = 5  # tokens
BUDGETS = {10_000: 1, 30: 3, 1: 6}  # padded tokens, and the micro-batches that they make
NO_CLIP = Optimizer(gradient_clip=0.0)

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def batch(folder: Path) -> Experience:
    """Experience drawn by the policy itself, so that mu is its own log-prob."""
    model, rng = load_causal(folder), np.random.default_rng(0)
    prompts = Jagged.from_rows([tiny.encode(p) for p, _ in ROWS], np.int32)
    responses = Jagged.from_rows([tiny.encode(r) for _, r in ROWS], np.int32)
    behaviour = [tiny.log_probs(model, p, r, TEMPERATURE) for p, r in zip(prompts, responses, strict=True)]
    noise = [rng.normal(size=len(responses.values)).astype(np.float32) for _ in range(4)]
    advantages, returns, values, reference = (responses.with_values(n) for n in noise)
    return Experience(
        sample_ids=np.arange(70, 70 + len(ROWS), dtype=np.int64),
        prompts=prompts,
        responses=responses,
        loss_mask=Jagged.from_rows(MASKS, np.uint8),
        log_probs=Jagged.from_rows(behaviour, np.float32),
        advantages=advantages,
        returns=returns,
        values=values,
        reference=reference,
        cost_returns=returns,
        cost_values=values,
    )


def worker(folder: Path, loss: Loss | None = None, optimizer: Optimizer = NO_CLIP, rate: float = 1e-3) -> PolicyWorker:
    model = Model(path=str(folder), learning_rate=rate)
    return PolicyWorker(model, loss or Loss(), optimizer, Generation(temperature=TEMPERATURE), seed=3)


def gradients_of(model: torch.nn.Module, update: Callable[[], object]) -> Gradients:
    """What stood in each parameter's gradient when the last micro-batch had been added."""
    seen: Gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    update()
    return seen


def assert_close(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def row_log_probs(model: torch.nn.Module, batch: Experience, row: int) -> torch.Tensor:
    """One unpadded forward, with gradient."""
    prompt, tokens = batch.prompts[row], np.concatenate([batch.prompts[row], batch.responses[row]])
    ids = torch.from_numpy(tokens[None].astype(np.int64))
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)


def rows_mean(losses: list[torch.Tensor], batch: Experience, how: Aggregation) -> torch.Tensor:
    """A batch's loss from its rows' token losses, by the name's own words."""
    trained = [
        row[torch.from_numpy(mask.astype(bool))]
        for row, mask in zip(losses, batch.loss_mask, strict=True)
        if mask.any()
    ]
    match how:
        case "token-mean":
            return torch.cat(trained).mean()
        case "sequence-mean-token-sum":
            return torch.stack([row.sum() for row in trained]).mean()
        case "sequence-mean-token-mean":
            return torch.stack([row.mean() for row in trained]).mean()
        case "sequence-mean-fixed-length":
            return torch.stack([row.sum() / FIXED_LENGTH for row in trained]).mean()


def saved(policy: PolicyWorker, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    policy.save(str(folder))
    return contents(folder)


# --- one optimizer step


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_gradient_is_reinforces_for_every_aggregation_and_cut(
    folder: Path, batch: Experience, how: Aggregation, budget: int
):
    plain = load_causal(folder)
    losses = [-torch.tensor(batch.advantages[row]) * row_log_probs(plain, batch, row) for row in range(len(batch))]
    loss = rows_mean(losses, batch, how)
    want = gradients_of(plain, loss.backward)
    policy = worker(folder, Loss(aggregation=how, fixed_length=FIXED_LENGTH, tokens_per_micro_batch=budget))
    measured = {}
    got = gradients_of(policy.model.module, lambda: measured.update(policy.update(batch).values))
    assert_close(got, want)
    at_ratio_1 = [-torch.tensor(batch.advantages[row]) for row in range(len(batch))]
    assert measured["loss"] == pytest.approx(rows_mean(at_ratio_1, batch, how).item(), abs=1e-5)


def test_the_budgets_cut_the_batch_as_they_say(batch: Experience):
    assert {budget: len(list(micro_batches(batch, budget))) for budget in BUDGETS} == BUDGETS


def test_a_batch_without_a_trained_token_has_no_gradient(folder: Path, batch: Experience):
    policy = worker(folder)
    got = gradients_of(policy.model.module, lambda: policy.update(take(batch, [2])))
    assert not any(gradient.any() for gradient in got.values())


def test_on_policy_nothing_is_clipped_and_mu_is_the_policy(folder: Path, batch: Experience):
    policy = worker(folder)
    measured = policy.update(batch).values
    assert policy.trained.version == 1
    assert measured["clip_fraction"] == 0
    assert measured["mismatch_kl"] == pytest.approx(0, abs=1e-5)
    assert measured["log_ratio_max"] == pytest.approx(0, abs=1e-5)
    assert measured["tokens"] == sum(map(sum, MASKS))
    inside = batch.loss_mask.values != 0
    assert measured["negative_log_likelihood"] == pytest.approx(-batch.log_probs.values[inside].mean(), abs=1e-5)


def test_mismatch_is_measured_against_mu(folder: Path, batch: Experience):
    moved = batch.log_probs.with_values(batch.log_probs.values + np.float32(0.25))
    measured = worker(folder).update(msgspec.structs.replace(batch, log_probs=moved)).values
    assert measured["mismatch_kl"] == pytest.approx(0.25, abs=1e-5)
    assert measured["log_ratio_max"] == pytest.approx(0.25, abs=1e-5)


def test_log_probs_are_at_the_sampling_temperature(folder: Path, batch: Experience):
    rollouts = Rollouts(
        sample_ids=batch.sample_ids,
        prompts=batch.prompts,
        references=Jagged.from_texts([""] * len(batch)),
        responses=batch.responses,
        log_probs=batch.log_probs,
        versions=batch.responses.with_values(np.zeros(len(batch.responses.values), np.int32)),
        loss_mask=batch.loss_mask,
        finishes=np.zeros(len(batch), np.uint8),
    )
    got = worker(folder).log_probs(rollouts)
    assert np.array_equal(got.sample_ids, batch.sample_ids)
    np.testing.assert_allclose(got.log_probs.values, batch.log_probs.values, atol=1e-5)


# --- several optimizer steps


def test_the_trust_region_stands_around_the_weights_at_the_start_of_the_step(folder: Path, batch: Experience):
    loss, steady = Loss(epochs=2, mini_batches=2, dual_clip=0.0), Optimizer(gradient_clip=0.0, epsilon=1e-2)
    policy = worker(folder, loss, steady, rate=2e-2)
    measured = policy.update(batch).values
    assert measured["clip_fraction"] > 0  # against weights refreshed at each optimizer step every ratio would be 1

    plain = load_causal(folder)
    with torch.no_grad():
        start = {int(i): row_log_probs(plain, batch, row) for row, i in enumerate(batch.sample_ids)}
    optimizer = torch.optim.AdamW(plain.parameters(), 2e-2, (0.9, 0.95), eps=1e-2, weight_decay=0.0)
    for part in mini_batches(batch, loss, seed=3):
        losses = []
        for row, sample in enumerate(part.sample_ids.tolist()):
            ratio = (row_log_probs(plain, part, row) - start[sample]).exp()
            advantages = torch.tensor(part.advantages[row])
            losses.append(-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages))
        rows_mean(losses, part, "token-mean").backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(policy.model.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("loss", [Loss(tokens_per_micro_batch=1), Loss(epochs=2, mini_batches=3)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_refused_step_changes_nothing_and_poisons_nothing(
    folder: Path, tmp_path: Path, batch: Experience, loss: Loss, bad: float
):
    policy, untouched = worker(folder, loss), worker(folder, loss)
    for each in (policy, untouched):
        each.update(batch)
    before = saved(policy, tmp_path / "before")
    poisoned = batch.advantages.values.copy()
    poisoned[-1] = bad  # the last row: the gradients of earlier micro-batches are there already
    with pytest.raises(
        StepRefused, match=r"policy\.update of batch of \d samples \(.*7\d.*\): (loss|gradient norm) is"
    ):
        policy.update(msgspec.structs.replace(batch, advantages=batch.advantages.with_values(poisoned)))
    assert saved(policy, tmp_path / "after") == before
    assert policy.trained.version == 1
    assert not policy.model.module.training
    for each in (policy, untouched):
        each.update(batch)
    assert saved(policy, tmp_path / "next") == saved(untouched, tmp_path / "untouched")


def test_an_unknown_loss_is_refused_by_name(folder: Path):
    with pytest.raises(LookupError, match=r"loss\.policy 'pppo': one of ppo"):
        worker(folder, Loss(policy="pppo"))


# --- publication and checkpoints


def test_a_snapshot_proves_itself_and_later_steps_do_not_reach_it(folder: Path, batch: Experience):
    policy = worker(folder)
    policy.update(batch)
    manifest, buffer = policy.snapshot(Version(1, 1))
    verify(manifest.tensors, buffer)
    probe = manifest.probe
    assert probe is not None
    for tokens, answer in zip(probe.tokens, probe.log_probs, strict=True):
        row = np.array(tokens, np.int32)
        np.testing.assert_allclose(answer, tiny.log_probs(policy.model.module, row[:1], row[1:]), atol=1e-5)
    kept = digest(buffer)
    policy.update(batch)
    assert digest(buffer) == kept
    changed = policy.snapshot(Version(1, 2))[0]
    assert [e.name for e in changed.tensors] == [e.name for e in manifest.tensors]
    assert any(a.digest != b.digest for a, b in zip(changed.tensors, manifest.tensors, strict=True))
    assert changed.probe is not None
    assert changed.probe.tokens == probe.tokens


def test_a_loaded_policy_goes_on_like_one_that_never_stopped(folder: Path, tmp_path: Path, batch: Experience):
    loss = Loss(epochs=2, mini_batches=2)  # their order is drawn by version, so it has to come back as well
    policy, loaded = worker(folder, loss), worker(folder, loss)
    policy.update(batch)
    saved(policy, tmp_path / "stop")
    loaded.load(str(tmp_path / "stop"))
    for each in (policy, loaded):
        each.update(batch)
        each.update(batch)
    assert saved(loaded, tmp_path / "loaded") == saved(policy, tmp_path / "never stopped")
