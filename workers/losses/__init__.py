"""Policy losses by name: a function and a line here each, or a user's own by "package.module:function".

A loss is a pure function of `Tokens`. What is composed with it (a correction, a KL term, an entropy bonus, an
aggregation) stands beside it in this package and knows nothing of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from workers.losses.policy import cispo, gspo, ppo, reinforce
from workers.losses.tokens import Surrogate, Tokens
from workers.settings import Loss

PolicyLoss = Callable[[Tokens, Loss], Surrogate]

POLICY_LOSSES: dict[str, PolicyLoss] = {"ppo": ppo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}


def policy_loss_named(name: str) -> PolicyLoss:
    """A registered loss, or the function that "package.module:function" names.

    Raises LookupError saying what is known, what could not be imported or what is not there, whatever the module
    raises.
    """
    if name in POLICY_LOSSES:
        return POLICY_LOSSES[name]
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise LookupError(f"loss.policy {name!r}: one of {', '.join(POLICY_LOSSES)}, or package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise LookupError(f"loss.policy {name!r}: importing {module} raised {type(error).__name__}: {error}") from error
    if not callable(function):
        raise LookupError(f"loss.policy {name!r}: module {module} has no function {attribute!r}")
    return cast(PolicyLoss, function)
