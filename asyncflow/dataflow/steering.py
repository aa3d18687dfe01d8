"""Applies a recipe's [advantage] kl to a dataflow: the KL coefficient stays fixed, or adapts to a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from asyncflow.dataflow.graph import Dataflow, DataflowError
from asyncflow.dataflow.trace import defaults_of
from workers.advantages.adaptive_kl import KL_COEFFICIENT, steered, steered_state, steering_of


def with_steering(dataflow: Dataflow, advantage_kwargs: Mapping[str, Any]) -> Dataflow:
    """The dataflow, whose batch stage carries an adaptive KL coefficient if [advantage] has `kl = "adaptive"`.

    Raises DataflowError for a batch function without a KL coefficient.
    """
    if steering_of(advantage_kwargs).kl == "fixed":
        return dataflow
    stage = dataflow.batch_stage
    assert stage.function is not None
    if KL_COEFFICIENT not in defaults_of(stage.function):
        raise DataflowError(f"{stage.name} takes no {KL_COEFFICIENT}: advantage.kl = 'adaptive' has nothing to adapt")
    state = steered_state(stage.state)
    adaptive = replace(stage, function=steered(stage.function, stage.state, state), state=state)
    return replace(dataflow, stages=tuple(adaptive if s is stage else s for s in dataflow.stages))
