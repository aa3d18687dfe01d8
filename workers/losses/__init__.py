"""Policy losses by name: one function and one line here each, or a user's own as "package.module:function".

A loss is a pure function of `Tokens`. The parts composed with it (correction, KL term, entropy bonus, aggregation) are
in this package too and do not depend on it.
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

    Raises LookupError for an unknown name, a module that fails to import (for whatever reason) and a missing function.
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
