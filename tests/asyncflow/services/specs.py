"""Specs of small services that do arithmetic instead of learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncflow.services.ranks.spec import ServiceSpec, StageSpec, Target
from protocols.data.messages import LogProbs

WORKERS = "tests.asyncflow.services.workers"


def service(name: str, *stages: StageSpec, kind: str = "Doubler", **changes: Any) -> ServiceSpec:
    """A service whose worker is a class of `workers`; a prompt has one sample."""
    settings = {
        "run": "test",
        "term": 0,
        "seed": 0,
        "deterministic": False,
        "pool": "main",
        "leased": False,
        "samples_per_prompt": 1,
        "mailbox_rows": 1024,
        "firing_rows": 1024,
    }
    return ServiceSpec(name=name, kind=f"{WORKERS}:{kind}", stages=list(stages), **{**settings, **changes})


def stage(
    name: str, *, sources: Sequence[str] = ("source",), outputs: Sequence[Target] = (), **changes: Any
) -> StageSpec:
    """A stage "service.method#1" with an input of log-probs for each source."""
    settings = {
        "method": name.split(".")[1].removesuffix("#1"),
        "fires": "rows",
        "inputs": [f"{name}.{position}" for position in range(len(sources))],
        "schemas": [LogProbs.schema_id] * len(sources),
        "protocol": "DP_PROTO",
    }
    return StageSpec(name=name, sources=list(sources), outputs=list(outputs), **{**settings, **changes})
