"""Checks of [observe] trackers: they are known and installed, their options fit, and no credential is in a recipe."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from asyncflow.observe.settings import Observe, Option
from asyncflow.observe.trackers.registry import make_tracker
from asyncflow.recipe.config import nearest
from protocols.control.errors import BadInput

_SECRETS = ("key", "token", "password", "secret")


def check_trackers(observe: Observe) -> None:
    """Make every tracker once; nothing is connected. Raises BadInput."""
    if repeated := sorted({name for name in observe.trackers if observe.trackers.count(name) > 1}):
        raise BadInput(f"observe.trackers: {repeated[0]!r} stands there twice")
    for name, options in observe.options.items():
        if name not in observe.trackers:
            known = nearest(name, observe.trackers) if observe.trackers else "; it names none"
            raise BadInput(f"observe.options.{name}: observe.trackers has no such tracker{known}")
        for option, value in options.items():
            if _is_secret(option, value):
                raise BadInput(
                    f"observe.options.{name}.{option} holds a credential, and the run folder keeps the recipe: leave "
                    f"it out, and give it by the environment or the login of {name}"
                )
    for name in observe.trackers:
        try:
            made = make_tracker(name, observe.options.get(name, {}))
        except LookupError as error:
            raise BadInput(f"observe.trackers: {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            raise BadInput(f"observe.options.{name}: {error}") from error
        if lacking := [method for method in ("start", "log", "texts", "close") if not hasattr(made, method)]:
            raise BadInput(f"observe.trackers: {name} has no method {', '.join(lacking)}")


def _is_secret(option: str, value: Option) -> bool:
    """Whether an option is a credential, by its name, or a URL that has one inside."""
    if any(word in option.lower().split("_") for word in _SECRETS):
        return True
    if not isinstance(value, str) or "://" not in value:
        return False
    url = urlsplit(value)
    named = (word for name, _ in parse_qsl(url.query) for word in name.lower().split("_"))
    return bool(url.password) or any(word in _SECRETS for word in named)
