"""Wraps a batch function so that its KL coefficient adapts to a target KL; the function itself does not change.

Each call uses the coefficient that earlier batches led to, and the KL measured on this batch sets the coefficient of
the next. The state carried from batch to batch is the coefficient, beside the function's own state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from protocols.data.messages import Experience, Metrics
from protocols.stage import Measured, Stateful
from workers.advantages.kl import AdaptiveKl

KL_COEFFICIENT = "kl_coefficient"  # the keyword argument of a batch function that is adapted; reward per nat


class KlSteering(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of a recipe's [advantage] that say how the KL coefficient adapts.

    Raises ValueError for values with which an adaptive coefficient can't work.
    """

    kl: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = 0.01  # mean KL per token, nats
    kl_horizon: float = 10_000.0  # samples over which a KL far from its target changes the coefficient by a fifth

    def __post_init__(self) -> None:
        if self.kl == "adaptive":
            if self.kl_horizon % 1 != 0:  # written like this, it refuses NaN and infinity too
                raise ValueError(f"kl_horizon = {self.kl_horizon}: want a whole number of samples")
            self.from_coefficient(1.0)

    def from_coefficient(self, coefficient: float) -> AdaptiveKl:
        """The adaptive coefficient at this value. Raises ValueError unless it is above 0."""
        return AdaptiveKl(coefficient, self.kl_target, int(self.kl_horizon))


def steering_of(advantage_kwargs: Mapping[str, Any]) -> KlSteering:
    """The steering that a recipe's [advantage] asks for. Raises ValueError."""
    return msgspec.convert({k: v for k, v in advantage_kwargs.items() if k in KlSteering.__struct_fields__}, KlSteering)


def without_steering(advantage_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the batch function itself."""
    return {name: value for name, value in advantage_kwargs.items() if name not in KlSteering.__struct_fields__}


@functools.cache
def steered_state(own: type[msgspec.Struct] | None) -> type[msgspec.Struct]:
    """The state type of a steered function: `kl_coefficient`, and the function's `own` state, None at first."""
    kind: Any = type(None) if own is None else own | None
    return msgspec.defstruct("SteeredKl", [(KL_COEFFICIENT, float), ("own", kind, None)], frozen=True)


def steered(
    function: Callable[..., Measured[Experience] | Experience],
    own: type[msgspec.Struct] | None,
    state_type: type[msgspec.Struct],
) -> Callable[..., Stateful[Experience, Any]]:
    """The batch function with a KL coefficient that adapts to its target (Ziegler et al. 2019); see `AdaptiveKl.after`.

    It takes the function's keyword arguments and those of `KlSteering`; `kl_coefficient` is the initial value. It adds
    the metrics `kl_coefficient`, the value used for this batch, and `kl_target`. `own` is the type of the function's
    state, None if it has none. The result raises ValueError if the function reports no metric `kl`.
    """
    start = inspect.signature(function).parameters[KL_COEFFICIENT].default

    def apply(*inputs: Any, state: Any = None, **advantage_kwargs: Any) -> Stateful[Experience, Any]:
        kwargs = without_steering(advantage_kwargs)
        coefficient = state.kl_coefficient if state is not None else kwargs.get(KL_COEFFICIENT, start)
        steering = steering_of(advantage_kwargs).from_coefficient(coefficient)
        kwargs[KL_COEFFICIENT] = coefficient
        if own is not None:
            kwargs["state"] = state.own if state is not None else None
        result = function(*inputs, **kwargs)
        if not isinstance(result, Measured) or "kl" not in result.metrics.values:
            raise ValueError(
                f"{function.__name__} measures no 'kl', which an adaptive coefficient follows: add it to its metrics"
            )
        values = result.metrics.values
        after = steering.after(values["kl"], len(result.batch))
        values = {**values, KL_COEFFICIENT: coefficient, "kl_target": steering.target}
        own_state = result.state if isinstance(result, Stateful) else None
        metrics = Metrics(values=values, counts=result.metrics.counts)
        return Stateful(result.batch, metrics, state_type(after.coefficient, own_state))

    apply.__name__ = function.__name__
    return apply
