"""Merges the adapters of a model into its base weights, while the model is published, exported or probed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from workers.parallel.model import ParallelModel
from workers.training.lora import merged_weight, product


@contextmanager
def merged(model: ParallelModel) -> Iterator[None]:
    """Context in which the base weights include the adapters, as in a published model.

    B is 0 inside, so that forward passes round as with the published weights. At the end all weights are bitwise what
    they were. All ranks enter together, and not twice; without adapters nothing happens.
    """
    if (adapters := model.adapters) is None:
        yield
        return
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for own in adapters.weights:
                a, b, shape = model.weight(own.a), model.weight(own.b), model.specs[own.weight].shape
                change = product(a, b, shape, transposed=own.transposed)
                assert change is not None, f"the adapter of {own.weight} does not fit it"
                kept |= {name: model.parameters[name].detach().clone() for name in (own.weight, own.b)}
                weight = model.parameters[own.weight]
                weight.copy_(merged_weight(weight, model.held_part(own.weight, change), adapters.scaling))
                model.parameters[own.b].zero_()
        yield
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                model.parameters[name].copy_(tensor)
