"""Warns of a step whose rewards can teach the policy nothing, because they are all the same."""

from __future__ import annotations

from collections.abc import Mapping

from asyncflow.services.batch_metrics import FLAT_GROUPS, HIGHEST, LOWEST


def reward_warning(
    step: int, samples: int, prompts: int, metrics: Mapping[str, float], *, compares_samples: bool
) -> str:
    """The warning about a trained step, "" for none. `compares_samples`: the algorithm does, within each prompt."""
    if samples < 2 or LOWEST not in metrics:
        return ""
    if metrics[LOWEST] == metrics[HIGHEST]:
        return f"all {samples} rewards of step {step} are {metrics[LOWEST]:g}: the policy learns nothing from them"
    if compares_samples and metrics[FLAT_GROUPS] == 1.0:
        return (
            f"the samples of each of the {prompts} prompts of step {step} have equal rewards: the policy learns "
            "nothing from them, because the algorithm compares the samples of a prompt"
        )
    return ""
