"""Reloads a user's algorithm from its changed file during a run: the computation may change, the wiring may not.

Channels, mailboxes and the recipe's defaults are fixed when the run starts.
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
    module: ModuleType, name: str, advantage_kwargs: Mapping[str, Any], running: Dataflow, declared: Declaration
) -> Dataflow:
    """The dataflow of algorithm `name` in a new module. Raises DataflowError if it can't replace the running one."""
    function = getattr(module, name.partition(":")[2], None)
    if not hasattr(function, "__asyncflow_algorithm__"):
        raise DataflowError(f"algorithm {name!r}: {module.__file__} has no such function marked with @algorithm")
    assert function is not None
    if declaration_of(function) != declared:
        raise DataflowError(f"algorithm {name!r} declares other defaults: they belong to the recipe and need a new run")
    traced = trace(function)
    new = traced.batch_stage.function
    assert new is not None
    old = running.batch_stage.function
    assert old is not None
    if lost := sorted(defaults_of(old).keys() - defaults_of(new).keys()):
        raise DataflowError(f"algorithm {name!r}: {new.__name__} no longer takes {', '.join(lost)}")
    required = {keyword for keyword, default in defaults_of(new).items() if default is Parameter.empty}
    if missing := sorted(required - advantage_kwargs.keys()):
        raise DataflowError(f"algorithm {name!r}: {new.__name__} needs {', '.join(missing)}; give it a default")
    steered = with_steering(traced, advantage_kwargs)
    if steered.draw() != running.draw():
        raise DataflowError(
            f"algorithm {name!r} is wired differently from the run, so it needs a new run:\n{steered.draw()}\n"
            f"the run has:\n{running.draw()}"
        )
    if (steered.batch_stage.state is None) != (running.batch_stage.state is None):
        raise DataflowError(f"algorithm {name!r}: {new.__name__} must carry a state where the running one does")
    return steered
