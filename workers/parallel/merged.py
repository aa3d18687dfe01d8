"""Merges the adapters of a model into its base weights, while the model is published, exported or probed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from workers.parallel.model import ParallelModel
from workers.training.lora import adapter_parameters, merged_weight, product


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
            for layer, transposed in adapters.layers.items():
                base, a, b = adapter_parameters(layer)
                change = model.held_part(base, product(model.weight(a), model.weight(b), transposed=transposed))
                kept |= {name: model.parameters[name].detach().clone() for name in (base, b)}
                weight = model.parameters[base]
                weight.copy_(merged_weight(weight, change, adapters.scaling))
                model.parameters[b].zero_()
        yield
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                model.parameters[name].copy_(tensor)
