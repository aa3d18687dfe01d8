"""What a run may go on with: which keys of a recipe may change when a run is resumed, and why others may not. Pure.

A checkpoint holds weights, optimizer, the position in the data and the ids of the samples in flight. A key is fixed
where another value would make one of them mean something else, or would mix two experiments in one learning curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from asyncflow.recipe.config import Recipe

_MODEL = "a checkpoint holds what training made of that model; start a new run from the policy that this one exports"
_SAMPLES = "the sample ids in the checkpoint would mean other samples"

# A key or a table -> why a resumed run can't have another value; "": it can. The longest entry decides; * is any name.
RULES: Mapping[str, str] = {
    "name": "the run has its name already",
    "folder": "",  # the run stays where it is
    "steps": "",
    "prompts_per_step": "the samples in flight were admitted for steps of that size",
    "samples_per_prompt": _SAMPLES,
    "algorithm": "another algorithm trains other models on other messages",
    "staleness": "the samples in flight were admitted under that bound",
    "seed": _SAMPLES,
    "deterministic": "a run repeats itself bit for bit from its first step on, or not at all",
    "runtime": "",
    "ray_address": "",
    "metrics_host": "",
    "code": "",
    "max_refills": "",
    "threads": "",
    "inline_bytes": "",
    "store_bytes": "",
    "mailbox_rows": "",
    "firing_rows": "",
    "data": "the position in the data counts the rows of that file, rendered with those settings",
    "data.eval": "",
    "models": _MODEL,
    "models.*.learning_rate": "",
    "models.*.check": "",
    "models.*.lora.publish": "",
    "advantage": "",
    "advantage.kl": "a checkpoint holds the state of the coefficient's control, which the other way does not have",
    "loss": "",
    "optimizer": "",
    "generation": "",
    "failures": "",
    "evaluation": "",
    "checkpoints": "",
    "deadlines": "",
    "observe": "",
    "pools": "",
    "placement": "",
    "placed_by": "",
    "delays": "",
}


class Change(msgspec.Struct, frozen=True):
    """A key whose value differs; None: the recipe does not have it."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.before)} -> {_text(self.after)}"

    @property
    def fixed_because(self) -> str:
        """Why a resumed run can't have the new value; "" if it can."""
        return reason_of(self.key)


def changes(before: Recipe, after: Recipe) -> list[Change]:
    """The keys in which two resolved recipes differ."""
    one, other = (dict(_flat(msgspec.to_builtins(recipe))) for recipe in (before, after))
    keys = dict.fromkeys([*one, *other])
    return [Change(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]


def reason_of(key: str) -> str:
    """Why a resumed run can't have another value of a key; "" if it can. Raises KeyError for a key without a rule."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        for rule, reason in RULES.items():
            names = rule.split(".")
            if len(names) == length and all(name in ("*", part) for name, part in zip(names, parts, strict=False)):
                return reason
    raise KeyError(f"{key} has no rule in {__name__}.RULES")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, Mapping):
            yield prefix + name, value


def _text(value: Any) -> str:
    return "none" if value is None else msgspec.json.encode(value).decode()
