"""The dataflow that a recipe's [advantage] asks for: the algorithm's own, its KL coefficient steered or fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from asyncflow.dataflow.graph import Dataflow, DataflowError
from asyncflow.dataflow.trace import defaults_of
from workers.advantages.adaptive_kl import KL_COEFFICIENT, steered, steered_state, steering_of


def with_steering(dataflow: Dataflow, numbers: Mapping[str, Any]) -> Dataflow:
    """The dataflow whose batch stage carries an adaptive KL coefficient, where the numbers say `kl = "adaptive"`.

    Raises DataflowError for a batch function that has no such coefficient.
    """
    if steering_of(dict(numbers)).kl == "fixed":
        return dataflow
    stage = dataflow.batch_stage
    assert stage.function is not None
    if KL_COEFFICIENT not in defaults_of(stage.function):
        raise DataflowError(f"{stage.name} takes no {KL_COEFFICIENT}: advantage.kl = 'adaptive' has nothing to steer")
    state = steered_state(stage.state)
    adaptive = replace(stage, function=steered(stage.function, stage.state, state), state=state)
    return replace(dataflow, stages=tuple(adaptive if s is stage else s for s in dataflow.stages))
