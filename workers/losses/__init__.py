"""Policy losses by name: one function and one line here each, or a user's own as "package.module:function".

A loss is a pure function of `Tokens`. The parts composed with it (correction, KL term, entropy bonus, aggregation) are
in this package too and do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable

from workers.losses.policy import cispo, gspo, ppo, reinforce
from workers.losses.tokens import Surrogate, Tokens
from workers.settings import Loss
from workers.user_code import function_named

PolicyLoss = Callable[[Tokens, Loss], Surrogate]

POLICY_LOSSES: dict[str, PolicyLoss] = {"ppo": ppo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}


def policy_loss_named(name: str) -> PolicyLoss:
    """A registered loss or a user's. Raises LookupError as `function_named` does."""
    return function_named(name, POLICY_LOSSES, "loss.policy")
