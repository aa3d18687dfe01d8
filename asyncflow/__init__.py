"""asyncflow: asynchronous, streaming RLHF. Every model is an actor; a stage runs when its input messages arrive.

@asyncflow.algorithm                      declares a function as an algorithm
asyncflow.trace(function)                 traces it into a checked dataflow graph
async with asyncflow.launch(recipe) as run:     starts a run
    async for event in run.events(): ...
async with asyncflow.connect(url) as client:    drives the runs of a server, from another process or machine
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncflow.client.connect import Client, connect
    from asyncflow.client.run import Run
    from asyncflow.dataflow.graph import Dataflow, DataflowError
    from asyncflow.dataflow.trace import Flow, algorithm, trace
    from asyncflow.recipe.config import BadInput, Recipe, load_recipe
    from asyncflow.run.launch import launch, resume

__all__ = [
    "BadInput",
    "Client",
    "Dataflow",
    "DataflowError",
    "Flow",
    "Recipe",
    "Run",
    "algorithm",
    "connect",
    "launch",
    "load_recipe",
    "resume",
    "trace",
]

_MODULES = {  # name -> the module below asyncflow that defines it
    "BadInput": "recipe.config",
    "Recipe": "recipe.config",
    "load_recipe": "recipe.config",
    "Run": "client.run",
    "Client": "client.connect",
    "connect": "client.connect",
    "launch": "run.launch",
    "resume": "run.launch",
    "Dataflow": "dataflow.graph",
    "DataflowError": "dataflow.graph",
    "Flow": "dataflow.trace",
    "algorithm": "dataflow.trace",
    "trace": "dataflow.trace",
}


def _check_siblings() -> None:
    """Raise ImportError where another package shadows `protocols` or `workers`, which are common names."""
    own = Path(__file__).parent.parent
    for name in ("protocols", "workers"):
        spec = find_spec(name)
        found = Path(spec.origin).parent.parent if spec is not None and spec.origin else None
        if found != own:
            raise ImportError(
                f"asyncflow needs its own package {name!r} beside it in {own}, but Python finds {found or 'none'}; "
                f"remove or rename what shadows it (sys.path order decides)"
            )


_check_siblings()


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that tracing needs no torch and a client no Ray."""
    if name not in _MODULES:
        raise AttributeError(f"module 'asyncflow' has no attribute {name!r}")
    return getattr(importlib.import_module(f"asyncflow.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, which are imported on first use."""
    return __all__
