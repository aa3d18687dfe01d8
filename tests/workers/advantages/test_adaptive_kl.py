"""The adaptive KL coefficient: which coefficient each batch gets, and which state is carried to the next batch."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from protocols.data.messages import Costs, Metrics
from protocols.stage import Measured, Stateful
from tests.workers.advantages import batches
from workers.advantages.adaptive_kl import KlSteering, steered, steered_state, steering_of, without_steering
from workers.advantages.gae import gae
from workers.advantages.safe_rlhf import Multiplier, safe_rlhf

ROWS = batches.rollouts()
INPUTS = (ROWS, batches.reference(ROWS), batches.values(ROWS), batches.scores(ROWS))
COSTS = Costs(sample_ids=ROWS.sample_ids, costs=np.ones(len(ROWS), np.float32))
STEERED = {"kl": "adaptive", "kl_target": 0.02, "kl_horizon": 100.0, "kl_coefficient": 0.3}


def run(steps: int, state: Any = None, **numbers: Any) -> list[Stateful[Any, Any]]:
    """Apply GAE with an adaptive coefficient to the same rows, one batch after the other."""
    adaptive, results = steered(gae, None, steered_state(None)), []
    for _ in range(steps):
        results.append(adaptive(*INPUTS, state=state, **{**STEERED, **numbers}))
        state = results[-1].state
    return results


def test_each_batch_is_taken_with_the_coefficient_that_those_before_it_led_to():
    want = 0.3
    for result in run(4):
        plain = gae(*INPUTS, kl_coefficient=want)
        assert result.batch == plain.batch
        assert result.metrics.values == {**plain.metrics.values, "kl_coefficient": want, "kl_target": 0.02}
        want = (
            KlSteering("adaptive", 0.02, 100.0).from_coefficient(want).after(plain.metrics.values["kl"], 7).coefficient
        )
        assert result.state.kl_coefficient == want != 0.3


def test_the_recipes_numbers_reach_the_function():
    assert run(1, gamma=0.5)[0].batch == gae(*INPUTS, kl_coefficient=0.3, gamma=0.5).batch


def test_without_a_start_it_is_the_functions_own():
    adaptive = steered(gae, None, steered_state(None))
    result = adaptive(*INPUTS, kl="adaptive", kl_target=0.02, kl_horizon=100.0)
    assert result.metrics.values["kl_coefficient"] == 0.05


def test_a_state_that_was_written_down_goes_on():
    whole = run(4)
    saved = msgspec.json.encode(whole[1].state)
    resumed = run(2, msgspec.json.decode(saved, type=steered_state(None)))
    assert [r.state.kl_coefficient for r in resumed] == [r.state.kl_coefficient for r in whole[2:]]


def test_a_function_keeps_the_state_that_it_has_itself():
    state_type = steered_state(Multiplier)
    adaptive = steered(safe_rlhf, Multiplier, state_type)
    state: Any = None
    inputs = (*INPUTS[:3], INPUTS[2], INPUTS[3], COSTS)
    multiplier: Multiplier | None = None
    for _ in range(3):
        result = adaptive(*inputs, state=state, **STEERED)
        coefficient = result.metrics.values["kl_coefficient"]
        multiplier = safe_rlhf(*inputs, state=multiplier, kl_coefficient=coefficient).state
        state = msgspec.json.decode(msgspec.json.encode(result.state), type=state_type)
        assert result.state.own == state.own == multiplier
    assert multiplier is not None
    assert multiplier.value > 1.0


def test_a_function_that_measures_no_kl_can_not_be_followed():
    def silent(*inputs: Any, kl_coefficient: float = 0.1) -> Measured[Any]:
        return Measured(gae(*INPUTS).batch, Metrics(values={"reward": 1.0}))

    for function in (silent, lambda *inputs, kl_coefficient=0.1: gae(*INPUTS).batch):
        with pytest.raises(ValueError, match="measures no 'kl', which an adaptive coefficient follows"):
            steered(function, None, steered_state(None))(*INPUTS, **STEERED)


def test_the_numbers_are_told_apart():
    numbers = {"gamma": 1.0, **STEERED}
    assert steering_of(numbers) == KlSteering("adaptive", 0.02, 100.0)
    assert without_steering(numbers) == {"gamma": 1.0, "kl_coefficient": 0.3}
    assert steering_of({"gamma": 1.0}).kl == "fixed"


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"kl_target": 0.0}, "target = 0.0"),
        ({"kl_horizon": 0.5}, "kl_horizon = 0.5: want a whole number"),
        ({"kl_horizon": math.inf}, "kl_horizon = inf: want a whole number"),
        ({"kl_horizon": 0.0}, "horizon = 0"),
        ({"kl": "on"}, "kl"),
    ],
)
def test_numbers_that_can_not_steer_are_refused(numbers: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        steering_of({**STEERED, **numbers})
