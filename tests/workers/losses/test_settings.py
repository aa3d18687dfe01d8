"""The settings of a loss refuse values that make no sense, with the value in the message."""

from __future__ import annotations

import math
from typing import Any

import pytest

from workers.settings import Loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": 1.5}, "clip_low = 1.5: want 0 to 1"),
        ({"clip_low": math.nan}, "clip_low = nan: want 0 to 1"),
        ({"clip_high": -0.1}, "clip_high = -0.1: want 0 or more"),
        ({"dual_clip": 0.5}, "dual_clip = 0.5: want more than 1, or 0 for none"),
        ({"value_clip": -1.0}, "value_clip = -1.0: want 0 or more"),
        ({"tis_cap": 0.0}, "tis_cap = 0.0: want more than 0"),
        ({"icepop_low": 5.0}, "icepop_low = 5.0: want 0 or more, and less than icepop_high"),
        ({"sequence_low": -1.0}, "sequence_low = -1.0: want 0 or more"),
        (
            {"sequence_low": 2.0, "sequence_high": 1.0},
            "sequence_high = 1.0: want more than sequence_low, or 0 for none",
        ),
        ({"kl_coefficient": math.inf}, "kl_coefficient = inf: want 0 or more"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient = nan: want a finite number"),
        ({"fixed_length": -1}, "fixed_length = -1: want 0 or more"),
    ],
)
def test_a_value_without_a_meaning(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        Loss(**change)


@pytest.mark.parametrize("change", [{"correction": "tis"}, {"sequence_low": 0.5}, {"sequence_high": 2.0}])
def test_a_ratio_to_mu_takes_no_correction_on_top(change: dict[str, Any]):
    with pytest.raises(ValueError, match="old = 'mu' divides by the probability under the weights that sampled"):
        Loss(old="mu", **change)


def test_bounds_may_be_infinite():
    loss = Loss(correction="icepop", icepop_low=0.0, icepop_high=math.inf, tis_cap=math.inf, clip_high=math.inf)
    assert loss.corrects
    assert not Loss().corrects
