"""The policy's own calls, timed at a few sizes: inference, and steps of training."""

from __future__ import annotations

from functools import partial

from asyncflow.planning.calibration import Timed
from asyncflow.planning.machine import median_s
from asyncflow.planning.workbench import Workbench


def forward_calls(bench: Workbench, tokens: int) -> list[Timed]:
    """Inference of the policy's shape, over rows that fit one micro-batch."""
    place = bench.places.get("reference") or bench.places["policy"]
    timed = []
    for rows in bench.sizes.rows:
        rollouts = bench.rollouts(rows, tokens)
        if rollouts.token_counts.max() * rows <= bench.recipe.loss.tokens_per_micro_batch:
            seconds = median_s(partial(place.worker.log_probs, rollouts), bench.sizes.rounds)
            timed.append(Timed(int(rollouts.token_counts.sum()), seconds))
    return timed


def update_calls(bench: Workbench, tokens: int) -> list[Timed]:
    """A step of the policy: all of its optimizer steps together."""
    timed = []
    for rows in bench.sizes.trained_rows:
        experience = bench.experience(rows * bench.recipe.loss.mini_batches, tokens)
        if rows * experience.token_counts.max() <= bench.recipe.loss.tokens_per_micro_batch:
            work = partial(bench.places["policy"].worker.update, experience)
            seconds = median_s(work, bench.sizes.rounds)
            timed.append(Timed(int(experience.token_counts.sum()), seconds))
    return timed
