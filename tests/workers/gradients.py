"""The gradients that an update computes, and means over tokens by the definition of each aggregation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from workers.settings import Aggregation

FIXED_LENGTH = 5  # tokens, for "sequence-mean-fixed-length"

Gradients = dict[str, torch.Tensor]


def gradients_of(model: torch.nn.Module, update: Callable[[], object]) -> Gradients:
    """Each parameter's gradient after the last micro-batch of an update."""
    seen: Gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    update()
    return seen


def aggregated(rows: Sequence[torch.Tensor], how: Aggregation) -> torch.Tensor:
    """The mean over the trained tokens' losses, given row by row without empty rows."""
    match how:
        case "token-mean":
            return torch.cat(list(rows)).mean()
        case "sequence-mean-token-sum":
            return torch.stack([row.sum() for row in rows]).mean()
        case "sequence-mean-token-mean":
            return torch.stack([row.mean() for row in rows]).mean()
        case "sequence-mean-fixed-length":
            return torch.stack([row.sum() / FIXED_LENGTH for row in rows]).mean()
