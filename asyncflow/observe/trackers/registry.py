"""The trackers by the names that a recipe gives them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from asyncflow.observe.settings import Option
from asyncflow.observe.trackers.mlflow import MLflow
from asyncflow.observe.trackers.tensorboard import TensorBoard
from asyncflow.observe.trackers.tracker import Tracker
from asyncflow.observe.trackers.trackio import Trackio
from asyncflow.observe.trackers.wandb import Wandb
from workers.user_code import function_named

TRACKERS: dict[str, Callable[..., Tracker]] = {  # each needs the library of its name
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def make_tracker(name: str, options: Mapping[str, Option]) -> Tracker:
    """A tracker that has not started. Nothing is connected, and its library is not imported.

    Raises LookupError for an unknown name or a library that is not installed, TypeError or ValueError for an option.
    """
    make = function_named(name, TRACKERS, "tracker")
    if name in TRACKERS and importlib.util.find_spec(name) is None:
        raise LookupError(f"tracker {name!r}: its package is not installed; install asyncflow with [trackers], or it")
    return make(**options)
