"""Settings of the controller: the pace of a run, its checkpoints, its evaluations and its deadlines."""

from __future__ import annotations

import msgspec

from workers.settings import NonNegativeInt, Positive, Settings


class Checkpoints(Settings, frozen=True):
    """When the state is written, and how many checkpoints are kept."""

    every: NonNegativeInt = 10  # steps; 0: only at the end and on request
    keep: NonNegativeInt = 2  # the newest ones; 0: all


class Evaluation(Settings, frozen=True):
    """Greedy answers to the held-out prompts, scored by a rule that is not the reward."""

    metric: str = "exact_match"  # a rule's name
    every: NonNegativeInt = 0  # steps; 0: only before the first and after the last
    limit: NonNegativeInt = 0  # rows of the held-out file; 0: all


class Deadlines(Settings, frozen=True):
    """How long something may take before it is reported or ended, in seconds."""

    publish: Positive = 120.0  # one publication of weights
    checkpoint: Positive = 600.0  # writing one checkpoint
    stall: Positive = 120.0  # without progress: the wait-for graph is shown
    give_up: Positive = 900.0  # without progress: the run ends and shows the wait-for graph
    # Draining after a stop is requested. Then a step that no model has finished is given up, and trained again by a
    # resume; one that a model has finished is waited for.
    stop: Positive = 60.0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a run, in steps, prompts and samples."""

    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    staleness: int
    deterministic: bool = False  # the prompts of a step are generated together, one step at a time
    max_refills: int  # rounds of replaced prompts in one step before the run ends and reports the reject rate
