"""The policy losses. rho is the ratio pi_theta / pi_old of one token, A its advantage, eps the two clips.

On policy (rho = 1) each has the gradient of REINFORCE, -A d log pi_theta. They differ for tokens whose probability
has changed since they were sampled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.losses.tokens import Surrogate, Tokens, beyond_bound, bounded, log_ratio, row_means
from workers.settings import Loss


def ppo(tokens: Tokens, loss: Loss) -> Surrogate:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) (Schulman et al. 2017); see `clip_ratio`.

    eps_high > eps_low is DAPO's clip-higher (Yu et al. 2025). With correction = "importance" it is decoupled PPO
    (Hilton et al. 2022; AReaL, Fu et al. 2025): the trust region stands around prox, whatever mu was.
    """
    ratio = log_ratio(tokens, loss)
    surrogate = clip_ratio(torch.exp(bounded(ratio)), tokens.advantages, loss)
    return surrogate._replace(clipped=surrogate.clipped | (beyond_bound(ratio) & (tokens.advantages != 0)))


def gspo(tokens: Tokens, loss: Loss) -> Surrogate:
    """PPO with the sequence's ratio s = exp(mean of log rho over the row) (GSPO, Zheng et al. 2025).

    This is the paper's token form: s is a constant, and each token carries the gradient of its own log-prob. If a row
    has one advantage, the gradient equals that of the sequence form; per-token advantages are kept. The clips apply to
    s, which moves far less than a token's ratio: the paper's are 3e-4 and 4e-4.
    """
    mean = row_means(log_ratio(tokens, loss), tokens)
    ratio = torch.exp(bounded(mean)) * torch.exp(tokens.log_probs - tokens.log_probs.detach())
    surrogate = clip_ratio(ratio, tokens.advantages, loss)
    return surrogate._replace(clipped=surrogate.clipped | (beyond_bound(mean) & (tokens.advantages != 0)))


def cispo(tokens: Tokens, loss: Loss) -> Surrogate:
    """-sg(clip(rho, 1 - eps_low, 1 + eps_high)) A log pi_theta (CISPO, MiniMax-M1 2025).

    The weight is clipped, not the gradient, so every token keeps learning. clip_low = 1 means no lower bound.
    """
    ratio = torch.exp(bounded(log_ratio(tokens, loss).detach()))
    low, high = 1.0 - loss.clip_low, 1.0 + loss.clip_high
    weight = ratio.clamp(low, high)
    return Surrogate(-weight * tokens.advantages * tokens.log_probs, (ratio < low) | (ratio > high))


def reinforce(tokens: Tokens, loss: Loss) -> Surrogate:
    """-A log pi_theta (Williams 1992): no ratio and no clip, so only a correction accounts for stale tokens."""
    return Surrogate(-tokens.advantages * tokens.log_probs, torch.zeros_like(tokens.mask))


def clip_ratio(ratio: Tensor, advantages: Tensor, loss: Loss) -> Surrogate:
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), [T], for a ratio r that carries the gradient.

    With dual_clip c > 0 the loss is at most -c A where A < 0 (Ye et al. 2020).
    """
    clipped = ratio.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high)
    per_token = torch.maximum(-ratio * advantages, -clipped * advantages)
    if loss.dual_clip > 0.0:
        at_most = torch.minimum(per_token, -loss.dual_clip * advantages)
        per_token = torch.where(advantages < 0, at_most, per_token)
    high = (ratio > 1.0 + loss.clip_high) & (advantages > 0)
    low = (ratio < 1.0 - loss.clip_low) & (advantages < 0)
    dual = (ratio > (loss.dual_clip or math.inf)) & (advantages < 0)
    return Surrogate(per_token, high | low | dual)
