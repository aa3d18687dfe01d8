"""Off-policy corrections: the weight that each gives to prox / mu, with every policy loss."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.losses.by_hand import correction, random_batch, tokens_of
from workers.losses.corrections import CORRECTIONS, correct, sequences_within
from workers.losses.tokens import Tokens
from workers.settings import Correction, Loss

seeds = st.integers(0, 2**32 - 1)


def stale(rows: list[list[float]], masks: list[list[int]] | None = None) -> Tokens:
    """Tokens with these values of prox / mu."""
    k = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    zeros = torch.zeros_like(k)
    mask = torch.ones_like(k) if masks is None else torch.tensor([m for row in masks for m in row])
    lengths = torch.tensor([len(row) for row in rows])
    return Tokens(zeros, k.log(), zeros, zeros, mask != 0, lengths)


def test_every_correction_has_a_function():
    assert CORRECTIONS.keys() == set(get_args(Correction))


@pytest.mark.parametrize(
    ("name", "weights", "truncated"),
    [
        ("none", [1, 1, 1, 1], [0, 0, 0, 0]),
        ("importance", [0.25, 1, 2.5, 9], [0, 0, 0, 0]),
        ("tis", [0.25, 1, 2, 2], [0, 0, 1, 1]),  # cut to 2
        ("icepop", [0, 1, 2.5, 0], [1, 0, 0, 1]),  # 0.5 to 5, dropped outside
    ],
)
def test_weights_by_numbers(name: Correction, weights: list[float], truncated: list[int]):
    got = correct(stale([[0.25, 1.0], [2.5, 9.0]]), Loss(correction=name))
    np.testing.assert_allclose(got.values, weights)
    assert got.truncated.tolist() == [bool(x) for x in truncated]


@given(seeds)
def test_without_bounds_tis_and_icepop_are_importance_sampling(seed: int):
    tokens = tokens_of(random_batch(seed, stale=2.0))
    want = correct(tokens, Loss(correction="importance"))
    for loss in (
        Loss(correction="tis", tis_cap=math.inf),
        Loss(correction="icepop", icepop_low=0.0, icepop_high=math.inf),
    ):
        got = correct(tokens, loss)
        assert torch.equal(got.values, want.values)
        assert not got.truncated.any()


@given(seeds, st.sampled_from(get_args(Correction)), st.booleans())
def test_weights_are_those_worked_out_by_hand(seed: int, name: Correction, by_sequence: bool):
    loss = Loss(correction=name, tis_cap=1.2, icepop_low=0.7, icepop_high=1.4)
    if by_sequence:
        loss = Loss(correction=name, sequence_low=0.8, sequence_high=1.3)
    batch = random_batch(seed)
    got = correct(tokens_of(batch), loss)
    flat = [(row, t) for row, mask in enumerate(batch.mask) for t in range(len(mask))]
    for i, (row, t) in enumerate(flat):
        if batch.mask[row][t]:
            weight, truncated = correction(batch, row, t, loss)
            assert got.values[i].item() == pytest.approx(weight, abs=1e-12)
            assert bool(got.truncated[i]) == truncated


def test_a_weight_has_no_gradient():
    tokens = tokens_of(random_batch(0))
    theta = Tokens(
        tokens.log_probs, tokens.log_probs, tokens.rollout_log_probs, tokens.advantages, tokens.mask, tokens.lengths
    )
    assert not correct(theta, Loss(correction="tis", sequence_high=2.0)).values.requires_grad


# --- sequence masks


def test_a_sequence_is_kept_or_left_out_whole_by_the_mean_of_its_trained_tokens():
    rows, masks = [[4.0, 0.25], [4.0, 9.0], [1.0, 100.0], [0.1]], [[1, 1], [1, 1], [1, 0], [1]]
    got = correct(stale(rows, masks), Loss(sequence_low=0.5, sequence_high=2.0))
    # sqrt(4 x 1/4) = 1; sqrt(4 x 9) = 6, out; 1, the 100 is masked; 0.1, out
    assert got.values.tolist() == [1, 1, 0, 0, 1, 1, 0]
    assert got.truncated.tolist() == [False, False, True, True, False, False, True]


def test_a_sequence_mask_goes_with_any_correction():
    loss = Loss(correction="tis", tis_cap=1.5, sequence_high=2.0)
    assert correct(stale([[1.2, 2.0], [3.0, 3.0]]), loss).values.tolist() == pytest.approx([1.2, 1.5, 0, 0])


def test_each_bound_of_a_sequence_mask_may_be_left_out():
    tokens = stale([[0.01], [1.0], [100.0]])
    assert correct(tokens, Loss(sequence_low=0.5)).values.tolist() == [0, 1, 1]
    assert correct(tokens, Loss(sequence_high=2.0)).values.tolist() == [1, 1, 0]
    assert correct(tokens, Loss()).values.tolist() == [1, 1, 1]


def test_the_bounds_themselves_are_inside():
    tokens = stale([[1.0, 1.0]])
    assert sequences_within(tokens.old_log_probs - tokens.rollout_log_probs, tokens, 1.0, 1.0).all()
