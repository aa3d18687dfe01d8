"""asyncflow: asynchronous, streaming RLHF. Every model an actor, every stage fired by its messages.

@asyncflow.algorithm                      an algorithm is a traced function
asyncflow.trace(function)                 ... and becomes a checked graph
async with asyncflow.launch(recipe) as run:
    async for event in run.events(): ...
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncflow.client.run import Run
    from asyncflow.dataflow.graph import Dataflow, DataflowError
    from asyncflow.dataflow.trace import Flow, algorithm, trace
    from asyncflow.recipe.config import BadInput, Recipe, load_recipe
    from asyncflow.run.launch import launch, resume

__all__ = [
    "BadInput",
    "Dataflow",
    "DataflowError",
    "Flow",
    "Recipe",
    "Run",
    "algorithm",
    "launch",
    "load_recipe",
    "resume",
    "trace",
]

_HOME = {
    "BadInput": "recipe.config",
    "Recipe": "recipe.config",
    "load_recipe": "recipe.config",
    "Run": "client.run",
    "launch": "run.launch",
    "resume": "run.launch",
    "Dataflow": "dataflow.graph",
    "DataflowError": "dataflow.graph",
    "Flow": "dataflow.trace",
    "algorithm": "dataflow.trace",
    "trace": "dataflow.trace",
}


def _check_siblings() -> None:
    """`protocols` and `workers` are common names: make sure that nothing else on the path shadows ours."""
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
    """Import on first use: tracing needs no torch, a client no Ray."""
    if name not in _HOME:
        raise AttributeError(f"module 'asyncflow' has no attribute {name!r}")
    return getattr(importlib.import_module(f"asyncflow.{_HOME[name]}"), name)
