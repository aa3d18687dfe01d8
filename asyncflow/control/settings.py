"""What a controller is told: the pace of a run, its checkpoints, its evaluations and its deadlines."""

from __future__ import annotations

import msgspec


class Checkpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When state is written and how much of it is kept."""

    every: int = 10  # steps; 0: only at the end and when asked
    keep: int = 2  # newest; 0: all


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Greedy answers to the held-out prompts, judged by a rule that is no reward."""

    metric: str = "exact_match"  # a rule's name
    every: int = 0  # steps; 0: only before the first and after the last
    limit: int = 0  # rows of the held-out file; 0: all


class Deadlines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long something may take before it is reported or ended, in seconds."""

    publish: float = 120.0  # one publication of weights
    checkpoint: float = 600.0
    stall: float = 120.0  # nothing moves: the wait-for graph is shown
    give_up: float = 900.0  # nothing moves: the run ends with that graph
    stop: float = 60.0  # draining after a stop was asked for


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in one unit: prompts and samples per step."""

    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    staleness: int
    deterministic: bool = False  # whole waves of prompts, one at a time
    max_refills: int  # rounds of replaced prompts in one step before the run ends with the reject rate
