"""The output for a row is independent of padding, of micro-batches and of other rows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.jagged import Jagged
from tests import tiny
from workers.data.token_rows import TokenRows
from workers.parallel.backends import trained_model
from workers.parallel.model import ParallelModel
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Model
from workers.training.micro_batches import MicroBatch, in_row_order, micro_batches
from workers.training.models import (
    canonical_tensors,
    load_causal,
    load_critic,
    load_reward,
    log_softmax_of,
    response_log_probs,
    sequence_scores,
)

ROWS = [("12+34=", "46"), ("7*", "7 is the answer"), ("what is this?", ""), ("a", "b"), ("9-9=", "0")]
TEXTS = TokenRows.of(*([tiny.encode(text) for text in texts] for texts in zip(*ROWS, strict=True)))
BUDGETS = [1, 20, 40, 10_000]  # one row at a time, then more and more together


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> ParallelModel:
    return trained_model(Model(path=str(policy_folder)), ONE_DEVICE)


@pytest.fixture(scope="module")
def critic(reward_folder: Path) -> ParallelModel:
    return trained_model(Model(path=str(reward_folder)), ONE_DEVICE, head="value")


def log_probs(model: ParallelModel, texts: TokenRows, budget: int = 100, temperature: float = 1.0) -> Jagged:
    numbers = model.outputs(texts, budget, lambda o, m: response_log_probs(o, m, temperature))
    assert numbers is not None
    return texts.responses.with_values(numbers)


def values(model: ParallelModel, budget: int = 100) -> Jagged:
    numbers = model.outputs(TEXTS, budget, lambda o, m: o.before_response(m).squeeze(-1))
    assert numbers is not None
    return TEXTS.responses.with_values(numbers)


# --- forward passes


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_each_row_alone(policy: ParallelModel, budget: int, temperature: float):
    got = log_probs(policy, TEXTS, budget, temperature)
    assert got.dtype == np.float32
    for prompt, response, row in zip(TEXTS.prompts, TEXTS.responses, got, strict=True):
        np.testing.assert_allclose(row, tiny.log_probs(policy.module, prompt, response, temperature), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("budget", BUDGETS)
def test_values_are_those_of_each_row_alone(critic: ParallelModel, budget: int):
    got = values(critic, budget)
    for prompt, response, row in zip(TEXTS.prompts, TEXTS.responses, got, strict=True):
        tokens = torch.tensor(np.concatenate([prompt, response])[None], dtype=torch.int64)
        alone = critic.module(input_ids=tokens).logits[0, len(prompt) - 1 : -1, 0]
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)
    assert got.values.std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("budget", BUDGETS)
def test_scores_are_what_transformers_says_of_each_row_alone(reward_folder: Path, budget: int):
    model = load_reward(reward_folder)
    got = trained_model(Model(path=str(reward_folder)), ONE_DEVICE, head="score").outputs(
        TEXTS, budget, sequence_scores, per_row=True
    )
    assert got is not None
    for prompt, response, score in zip(TEXTS.prompts, TEXTS.responses, got, strict=True):
        tokens = torch.tensor(np.concatenate([prompt, response])[None], dtype=torch.int64)
        assert score == pytest.approx(model(input_ids=tokens).logits.item(), abs=1e-5)


def test_a_padding_token_inside_a_row_is_a_token_like_others(policy: ParallelModel):
    texts = TokenRows.of([[tiny.PAD_ID, 4]], [[5, tiny.PAD_ID, 6]])
    got = log_probs(policy, texts)
    np.testing.assert_allclose(got[0], tiny.log_probs(policy.module, texts.prompts[0], texts.responses[0]), atol=1e-5)


def test_a_half_precision_model_answers_in_float32(policy_folder: Path, policy: ParallelModel):
    half = trained_model(Model(path=str(policy_folder), dtype="bfloat16"), ONE_DEVICE)
    assert half.module.dtype == torch.bfloat16
    got = log_probs(half, TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got.values, log_probs(policy, TEXTS).values, atol=0.3)


def test_no_rows_are_no_values(policy: ParallelModel):
    none = TEXTS.take(np.empty(0, np.int64))
    assert len(log_probs(policy, none).values) == 0


def test_a_response_to_an_empty_prompt_is_refused(policy: ParallelModel):
    texts = TokenRows.of([[3], []], [[4], [5]])
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        log_probs(policy, texts)


def test_greedy_log_probs_are_at_temperature_1_and_large_logits_stay_finite():
    logits, tokens = torch.tensor([[0.0, 1.0], [5e4, -5e4]]), torch.tensor([1, 1])
    got = log_softmax_of(logits, tokens, temperature=0.0)
    np.testing.assert_allclose(got.numpy(), [-np.log1p(np.exp(-1.0)), -1e5], rtol=1e-6)


# --- micro-batches


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=12), st.integers(1, 60), st.sampled_from([1, 2])
)
def test_a_cut_has_rows_of_similar_length_keeps_the_budget_and_is_as_coarse_as_it_may_be(
    sizes: list[tuple[int, int]], budget: int, together: int
):
    sizes = sizes[: len(sizes) // together * together]
    rows = TokenRows.of([np.ones(p) for p, _ in sizes], [np.ones(r) for _, r in sizes])
    parts = list(micro_batches(rows, budget, together=together))
    assert sorted(row for part in parts for row in part.rows) == list(range(len(sizes)))
    assert all([*part.rows] == sorted(part.rows) for part in parts)
    longest = [part.lengths.reshape(-1, together).max(axis=1) for part in parts]
    assert all(part.min() >= following.max() for part, following in pairwise(longest))
    assert all(part.rows[0] % together == len(part.rows) % together == 0 for part in parts)
    assert all(part.tokens.numel() <= budget or len(part.rows) == together for part in parts)
    for part in parts[:-1]:
        assert part.tokens.shape[1] * (len(part.rows) + together) > budget


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(1, 60),
    st.booleans(),
)
def test_what_is_read_of_micro_batches_is_joined_in_the_order_of_the_rows(
    sizes: list[tuple[int, int]], budget: int, per_row: bool
):
    rows = TokenRows.of([np.ones(p) for p, _ in sizes], [np.full(r, row) for row, (_, r) in enumerate(sizes)])
    parts = [torch.from_numpy(part.rows) if per_row else part.response_tokens() for part in micro_batches(rows, budget)]
    want = np.arange(len(sizes)) if per_row else rows.responses.values
    assert in_row_order(parts, rows, budget, per_row=per_row).tolist() == want.tolist()


def test_a_micro_batch_is_right_padded_and_knows_its_tokens():
    batch = MicroBatch(TEXTS, np.array([3, 0]))
    width = len("12+34=46")
    want = [[*tiny.encode("ab"), *[0] * (width - 2)], tiny.encode("12+34=46").tolist()]
    assert batch.tokens.tolist() == [list(map(int, row)) for row in want]
    assert batch.mask.tolist() == [[1, 1] + [0] * (width - 2), [1] * width]
    assert batch.response_tokens().tolist() == tiny.encode("b46").tolist()
    assert batch.column(TEXTS.responses).tolist() == tiny.encode("b46").tolist()


# --- loading


def test_a_policys_folder_gives_a_critic_whose_first_values_are_0(policy_folder: Path):
    critic = trained_model(Model(path=str(policy_folder)), ONE_DEVICE, head="value")
    assert not values(critic).values.any()
    assert not critic.module.training


def test_a_reward_models_folder_gives_a_critic_with_its_head(reward_folder: Path, critic: ParallelModel):
    weight = load_reward(reward_folder).get_parameter("score.weight")
    assert torch.equal(critic.module.get_parameter("score.weight"), weight)
    assert critic.module.get_parameter("score.bias").item() == 0.0


def test_a_critics_forward_is_the_same_twice_in_train_mode(critic: ParallelModel):
    critic.module.train()
    first, second = (values(critic) for _ in range(2))
    critic.module.eval()
    assert first == second


def test_a_folder_that_lacks_tensors_is_refused_not_filled_with_noise(policy_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: \['score.weight'\]"):
        load_reward(policy_folder)
    model = load_causal(policy_folder)
    tensors = {n: t for n, t in model.state_dict().items() if n != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=tensors)
    for load in (load_causal, load_critic):
        with pytest.raises(ValueError, match=r"model\.norm\.weight|'norm\.weight'"):
            load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_canonical_tensors_are_the_checkpoints(tmp_path: Path, tied: bool):
    model = load_causal(tiny.make_policy(tmp_path, tied=tied))
    names = set(canonical_tensors(model))
    assert ("lm_head.weight" in names) != tied
    assert names == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
