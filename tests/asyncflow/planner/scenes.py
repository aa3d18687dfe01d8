"""Small scenarios whose times can be added up by hand: a call takes its stage's seconds for any number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncflow.control.settings import Pace
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import trace
from asyncflow.planner.calibration.calibration import LinearFit
from asyncflow.planner.calibration.measured_speeds import MeasuredSpeed
from asyncflow.planner.costs.workload import Lengths
from asyncflow.planner.simulation.scenario import Scenario

TOKENS = 16
GENERATE, INFER, CRITIC, POLICY = 4.0, 1.0, 2.0, 3.0  # seconds of generating a batch, of a firing, and of each update

COLOCATED = {"policy": "main", "critic": "main", "reference": "main", "reward": "main"}
SPLIT = {"policy": "a", "reference": "a", "critic": "b", "reward": "b"}
APART = {"policy": "a", "critic": "b", "reference": "c", "reward": "d", "generator": "e"}


def scene(
    pools: Mapping[str, str], staleness: int = 0, algorithm: str = "ppo", steps: int = 12, **changes: Any
) -> Scenario:
    """Two prompts of two samples a step; every firing takes all available rows."""
    dataflow = trace(algorithm_named(algorithm))
    generating = "generator" if "generator" in pools else "policy"
    speed = {
        "policy": MeasuredSpeed(LinearFit(INFER, 0), LinearFit(POLICY, 0), GENERATE / TOKENS),
        "critic": MeasuredSpeed(LinearFit(INFER, 0), LinearFit(CRITIC, 0)),
        "cost_critic": MeasuredSpeed(LinearFit(INFER, 0), LinearFit(CRITIC, 0)),
        "generator": MeasuredSpeed(step_s=GENERATE / TOKENS),
    }
    services = [*dataflow.services, *(["generator"] if "generator" in pools else [])]
    inference = MeasuredSpeed(LinearFit(INFER, 0))
    settings: dict[str, Any] = {
        "dataflow": dataflow,
        "services": {s.name: generating if s.generates else s.service for s in dataflow.stages},
        "pools": {service: pools.get(service, "") for service in services},
        "devices": dict.fromkeys(pools.values(), 1),
        "speeds": {s: speed.get(s, inference if s in pools else MeasuredSpeed()) for s in services},
        "pace": Pace(steps=steps, prompts_per_step=2, samples_per_prompt=2, staleness=staleness, max_refills=50),
        "prompt": Lengths.fixed(8),
        "response": Lengths.fixed(TOKENS),
        "whole_batches": True,
    }
    return Scenario(**{**settings, **changes})
