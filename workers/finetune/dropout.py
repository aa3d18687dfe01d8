"""Applies a model's own dropout in supervised fine-tuning, with masks that the seed and the step decide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from workers.parallel.model import ParallelModel

_OTHER_HEADS = ("classifier", "summary")  # in the names of rates that a language model does not use


class NoDropout(ValueError):
    """Dropout is asked for, and the model's config has none."""


@contextmanager
def dropout_by_seed(model: ParallelModel, seed: int, step: int) -> Iterator[None]:
    """Context in which the model drops features, the same ones whenever seed and step are the same.

    Afterwards torch's random state is what it was, and the model is in eval mode, as it is in all else.
    """
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        model.module.train()
        try:
            yield
        finally:
            model.module.eval()


def refuse_without_dropout(config: PretrainedConfig, folder: str | Path) -> None:
    """Raise NoDropout if the language model of this config, from this folder, has no dropout above 0."""
    rates = {
        name: rate
        for name, rate in config.get_text_config().to_dict().items()
        if "drop" in name and isinstance(rate, int | float) and not any(head in name for head in _OTHER_HEADS)
    }
    if not any(rates.values()):
        raise NoDropout(
            f"dropout = true: {folder} has none in its config.json ({rates}): set it there, or leave dropout out"
        )
