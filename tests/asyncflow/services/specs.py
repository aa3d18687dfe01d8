"""Specs of small services that do arithmetic instead of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncflow.services.ranks.spec import (
    CustomSettings,
    Limits,
    ModelSettings,
    ServiceSpec,
    StageSpec,
    Target,
)
from protocols.data.messages import LogProbs
from workers.settings import Generation, Model

WORKERS = "tests.asyncflow.services.workers"


def service(
    name: str,
    *stages: StageSpec,
    worker: str = "Doubler",
    options: dict[str, str] | None = None,
    mailbox_rows: int = 1024,
    firing_rows: int = 1024,
    **changes: Any,
) -> ServiceSpec:
    """A service whose worker is a class in `workers` (unless `settings` is given), with one sample per prompt."""
    fields = {
        "settings": CustomSettings(f"{WORKERS}:{worker}", options or {}),
        "limits": Limits(mailbox_rows, firing_rows),
        "run": "test",
        "term": 0,
        "seed": 0,
        "deterministic": False,
        "pool": "main",
        "leased": False,
        "samples_per_prompt": 1,
    }
    return ServiceSpec(name=name, stages=list(stages), **{**fields, **changes})


def settings_of(role: str, model: Model, generation: Generation | None = None) -> ModelSettings:
    """The settings of a role with such a model, all else as by default."""
    return ModelSettings(role, model, generation=generation or Generation())


def stage(
    name: str, *, sources: Sequence[str] = ("source",), outputs: Sequence[Target] = (), **changes: Any
) -> StageSpec:
    """A stage "service.method#1" with one input of log-probs per source."""
    settings = {
        "method": name.split(".")[1].removesuffix("#1"),
        "fires": "rows",
        "inputs": [f"{name}.{position}" for position in range(len(sources))],
        "schemas": [LogProbs.schema_id] * len(sources),
        "protocol": "DP_PROTO",
    }
    return StageSpec(name=name, sources=list(sources), outputs=list(outputs), **{**settings, **changes})
