"""Validates a user's policy loss on a few tokens, so that a wrong one fails before it gets a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from workers.losses import PolicyLoss, policy_loss_named
from workers.losses.tokens import Surrogate, Tokens
from workers.settings import Loss
from workers.user_code import UserFunction


def reloadable_loss(loss: Loss) -> UserFunction[PolicyLoss]:
    """The loss that the settings name, reloadable from its source file. Raises LookupError if there is none."""
    return UserFunction(loss.policy, policy_loss_named(loss.policy), partial(validate_loss, loss=loss))


def validate_loss(function: Any, loss: Loss) -> None:
    """Call a policy loss on two rows, on policy and off policy.

    Raises ValueError for a wrong type, shape or gradient, and whatever the loss itself raises.
    """
    for distance in (0.0, 0.5):
        log_probs = torch.tensor([-0.5, -1.0, -2.0, -0.1, -3.0], requires_grad=True)
        others = log_probs.detach() - distance
        surrogate = function(
            Tokens(
                log_probs=log_probs,
                old_log_probs=others,
                rollout_log_probs=others,
                advantages=torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0]),
                mask=torch.tensor([True, True, False, True, True]),
                lengths=torch.tensor([3, 2]),
                reference=others,
            ),
            loss,
        )
        if not isinstance(surrogate, Surrogate):
            raise ValueError(f"it returned {type(surrogate).__name__}, want a Surrogate of loss and clipped")
        shapes = {name: tuple(part.shape) for name, part in surrogate._asdict().items()}
        if set(shapes.values()) != {tuple(log_probs.shape)}:
            raise ValueError(f"it returned shapes {shapes} for {len(log_probs)} tokens")
        surrogate.loss.sum().backward()
        if log_probs.grad is None or not bool(torch.isfinite(log_probs.grad).all()):
            raise ValueError(f"its gradient is {log_probs.grad}")
