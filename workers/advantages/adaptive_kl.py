"""An adaptive KL coefficient around any batch function that has one: the function itself stays as it is.

The function is called with the coefficient that the batches before have led to; the KL that it measures of this batch
moves the coefficient of the next. What is carried from batch to batch is the coefficient, beside whatever the
function carries itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from protocols.data.messages import Experience, Metrics
from protocols.stage import Measured, Stateful
from workers.advantages.kl import AdaptiveKl

KL_COEFFICIENT = "kl_coefficient"  # the number of a batch function that is steered: in nats' worth of reward


class KlSteering(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a recipe's [advantage] says of the KL coefficient, beside where it starts.

    Raises ValueError for numbers with which an adaptive coefficient can't be steered.
    """

    kl: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 0.01  # mean KL per token, nats
    kl_horizon: float = 10_000.0  # samples in which a KL far from its target moves the coefficient by a fifth

    def __post_init__(self) -> None:
        if self.kl == "adaptive":
            if self.kl_horizon % 1 != 0:  # so written, NaN and infinity are refused too
                raise ValueError(f"kl_horizon = {self.kl_horizon}: want a whole number of samples")
            self.from_coefficient(1.0)

    def from_coefficient(self, coefficient: float) -> AdaptiveKl:
        """The steering at a coefficient. Raises ValueError for one that is not above 0."""
        return AdaptiveKl(coefficient, self.kl_target, int(self.kl_horizon))


def steering_of(numbers: dict[str, Any]) -> KlSteering:
    """The steering that the numbers of a recipe's [advantage] ask for. Raises ValueError."""
    return msgspec.convert({k: v for k, v in numbers.items() if k in KlSteering.__struct_fields__}, KlSteering)


def without_steering(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are the batch function's own."""
    return {name: value for name, value in numbers.items() if name not in KlSteering.__struct_fields__}


@functools.cache
def steered_state(own: type[msgspec.Struct] | None) -> type[msgspec.Struct]:
    """The type of what a steered function carries: `kl_coefficient`, and the function's `own` state, None at first."""
    kind: Any = type(None) if own is None else own | None
    return msgspec.defstruct("SteeredKl", [(KL_COEFFICIENT, float), ("own", kind, None)], frozen=True)


def steered(
    function: Callable[..., Measured[Experience] | Experience],
    own: type[msgspec.Struct] | None,
    state_type: type[msgspec.Struct],
) -> Callable[..., Stateful[Experience, Any]]:
    """A batch function whose KL coefficient follows its target (Ziegler et al. 2019); see `AdaptiveKl.after`.

    Takes the function's own numbers and those of `KlSteering`; `kl_coefficient` is where it starts. It measures the
    coefficient that a batch was taken with (`kl_coefficient`) and the target (`kl_target`), beside the function's
    own measures, of which `kl` is followed. `own` is the type of the function's state, None where it has none. Raises
    ValueError for a batch of which the function measured no `kl`.
    """
    start = inspect.signature(function).parameters[KL_COEFFICIENT].default

    def apply(*inputs: Any, state: Any = None, **numbers: Any) -> Stateful[Experience, Any]:
        given = without_steering(numbers)
        coefficient = state.kl_coefficient if state is not None else given.get(KL_COEFFICIENT, start)
        steering = steering_of(numbers).from_coefficient(coefficient)
        given[KL_COEFFICIENT] = coefficient
        if own is not None:
            given["state"] = state.own if state is not None else None
        result = function(*inputs, **given)
        if not isinstance(result, Measured) or "kl" not in result.metrics.values:
            raise ValueError(
                f"{function.__name__} measures no 'kl', which an adaptive coefficient follows: add it to its metrics"
            )
        measured = result.metrics.values
        after = steering.after(measured["kl"], len(result.batch))
        told = {**measured, KL_COEFFICIENT: coefficient, "kl_target": steering.target}
        carried = result.state if isinstance(result, Stateful) else None
        metrics = Metrics(values=told, counts=result.metrics.counts)
        return Stateful(result.batch, metrics, state_type(after.coefficient, carried))

    apply.__name__ = function.__name__
    return apply
