"""The critic's loss equals its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.losses.value import value_loss


def numbers(seed: int, n: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values with gradient, an older critic's values near them, and returns."""
    rng = np.random.default_rng(seed)
    old, step, returns = (torch.from_numpy(rng.normal(0, scale, n)) for scale in (1.0, 0.5, 1.0))
    return (old + step).requires_grad_(), old, returns


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5]))
def test_value_and_gradient_region_by_region(seed: int, clip: float):
    values, old, returns = numbers(seed)
    loss = value_loss(values, old, returns, clip)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    for i, (v, o, r) in enumerate(zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)):
        near = min(max(v, o - clip), o + clip)
        worse = clip > 0 and (near - r) ** 2 > (v - r) ** 2  # only a clip that increases the loss counts
        assert loss[i].item() == pytest.approx(0.5 * ((near if worse else v) - r) ** 2, abs=1e-10)
        assert gradient[i].item() == pytest.approx(0.0 if worse else v - r, abs=1e-10)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_the_gradient_is_the_numeric_one(clip: float):
    values, old, returns = numbers(1)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, clip), (values,))
