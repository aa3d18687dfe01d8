"""A user's algorithm from its changed file, while its dataflow runs: what it computes may change, the wiring may not.

Channels, mailboxes and the recipe's defaults were laid out when the run started; they hold for all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from types import ModuleType
from typing import Any

from asyncflow.dataflow.graph import Dataflow, DataflowError
from asyncflow.dataflow.steering import with_steering
from asyncflow.dataflow.trace import Declaration, declaration_of, defaults_of, trace


def retraced(
    module: ModuleType, name: str, numbers: Mapping[str, Any], running: Dataflow, declared: Declaration
) -> Dataflow:
    """The dataflow of the algorithm `name` as a new module has it. Raises DataflowError where it can't take over."""
    function = getattr(module, name.partition(":")[2], None)
    if not hasattr(function, "__asyncflow_algorithm__"):
        raise DataflowError(f"algorithm {name!r}: {module.__file__} has no such function marked with @algorithm")
    assert function is not None
    if declaration_of(function) != declared:
        raise DataflowError(f"algorithm {name!r} declares other defaults: they are a recipe's, so they need a new run")
    traced = trace(function)
    new = traced.batch_stage.function
    assert new is not None
    own = running.batch_stage.function
    assert own is not None
    if lost := sorted(defaults_of(own).keys() - defaults_of(new).keys()):
        raise DataflowError(f"algorithm {name!r}: {new.__name__} no longer takes {', '.join(lost)}")
    without = {number for number, default in defaults_of(new).items() if default is Parameter.empty}
    if asked := sorted(without - numbers.keys()):
        raise DataflowError(f"algorithm {name!r}: {new.__name__} asks for {', '.join(asked)}; give it a default")
    steered = with_steering(traced, numbers)
    if steered.draw() != running.draw():
        raise DataflowError(
            f"algorithm {name!r} is wired otherwise than the run, which takes a new run:\n{steered.draw()}\n"
            f"where the run has:\n{running.draw()}"
        )
    if (steered.batch_stage.state is None) != (running.batch_stage.state is None):
        raise DataflowError(f"algorithm {name!r}: {new.__name__} must carry a state where the running one does")
    return steered
