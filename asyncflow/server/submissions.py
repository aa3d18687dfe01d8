"""What a recipe may say that comes over HTTP: values, registered names, and paths below the server's root. No code.

`STRINGS` says for every text in a recipe what it is; a test compares it with the recipe's type, so that a new key is
not forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from asyncflow.recipe.config import Recipe, apply_override, read_table, to_recipe, to_settings, with_placed_by
from asyncflow.server.folder_views import HIDDEN
from protocols.control.errors import BadInput

Kind = Literal["text", "path", "name or path", "function", "server's"]

STRINGS: dict[str, Kind] = {
    "name": "text",
    "data.train": "path",
    "data.train.*.path": "path",
    "data.train.*.prompt": "text",
    "data.train.*.reference": "text",
    "data.eval": "path",
    "data.eval.*": "path",
    "data.eval.*.path": "path",
    "data.eval.*.prompt": "text",
    "data.eval.*.reference": "text",
    "data.eval.*.metric": "function",
    "data.eval.*.metric.*": "function",
    "data.prompt": "text",
    "data.reference": "text",
    "data.chat.system": "text",
    "data.chat.arguments.*": "text",
    "data.chat.tools": "text",
    "data.pretrain": "path",
    "models.*.path": "path",
    "models.*.rule": "function",
    "models.*.mix.*.name": "text",
    "models.*.mix.*.path": "path",
    "models.*.mix.*.rule": "function",
    "models.*.lora.targets.*": "text",
    "algorithm": "function",
    "ray_address": "server's",
    "metrics_host": "server's",
    "folder": "server's",
    "code.*": "server's",
    "advantage.*": "text",
    "loss.policy": "function",
    "generation.stop.*": "text",
    "evaluation.metric": "function",
    "evaluation.metric.*": "function",
    "observe.trackers.*": "function",
    "observe.options.*.*": "server's",  # addresses and folders
    "observe.project": "text",
    "pools.*.device": "name or path",
    "placement": "name or path",
    "placement.*.pool": "text",
    "placement.*.parallel": "text",
    "placement.*.generation": "text",
    "placed_by": "name or path",
}


def checked_recipe(
    table: Mapping[str, Any], overrides: Iterable[str], root: Path, functions: frozenset[str], code: list[str]
) -> Recipe:
    """The recipe of a submission. Raises BadInput, before anything that it names is imported or opened.

    Args:
        root: where its relative paths start, and what they may not leave.
        functions: names "package.module:function" that the server allows.
        code: the folders in which these are searched.
    """
    table = dict(table)
    for override in overrides:
        apply_override(table, override)
    for key, text in _texts(table, ""):
        check_text(key, text, root, functions)
    if "code" in table or "folder" in table:
        raise BadInput("recipe: code and folder are the server's own: leave them out")
    return to_recipe({**table, "code": code, "folder": str(root)})


def restarted_recipe(path: Path, overrides: Iterable[str], root: Path, functions: frozenset[str]) -> Recipe:
    """The recipe of a run's folder with a client's overrides, of which nothing is imported. Raises BadInput.

    Only the overrides are checked as a submission is: what else the recipe names, the run has had from its start.
    """
    given: dict[str, Any] = {}
    overrides = list(overrides)
    for override in overrides:
        apply_override(given, override)
    for key in given:
        if key in ("folder", "code", "name"):
            raise BadInput(f"--set {key}: a run keeps it")
    for key, text in _texts(given, ""):
        check_text(key, text, root, functions)
    # A run's recipe has every default written out: so the algorithm, which may be the user's code, isn't needed.
    return to_settings(with_placed_by(read_table(path, "recipe", overrides)), Recipe, str(path))


def check_text(key: str, text: str, root: Path, functions: frozenset[str]) -> None:
    """Refuse a text that a client may not send under a key. Raises BadInput."""
    kind = kind_of(key)
    if kind == "server's" and text:
        raise BadInput(f"recipe: {key} is the server's own: leave it out")
    if kind == "function" and (":" in text or "/" in text or text.endswith(".py")) and text not in functions:
        raise BadInput(
            f"recipe: {key} = {text!r}: a server runs registered functions only, and those that it was started with: "
            f"`asyncflow serve --allow {text}`"
        )
    if kind == "path" or (kind == "name or path" and ("/" in text or "." in text)):
        _check_path(key, text, root)


def kind_of(key: str) -> Kind | None:
    """What the text under a key is; None for a word of a fixed list, and for what is no key at all."""
    parts = key.split(".")
    return next((kind for pattern, kind in STRINGS.items() if _matches(pattern.split("."), parts)), None)


def _matches(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=True))


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of a table with its dotted key, in which a dot of a name of the user's counts as one part."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{str(name).replace('.', '_')}" if key else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}.{number}")


def _check_path(key: str, text: str, root: Path) -> None:
    if not text:
        return
    top = root.resolve()
    try:
        found = (root / text).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links; a zero byte
        raise BadInput(f"recipe: {key} = {text[:200]!r}: {error}") from error
    if not found.is_relative_to(top):
        raise BadInput(f"recipe: {key} = {text[:200]!r}: want a path below the server's root {root}")
    if found == top or (found.is_dir() and any(any(found.rglob(name)) for name in HIDDEN)):
        raise BadInput(f"recipe: {key} = {text[:200]!r}: runs are below it: want a folder of its own")
    if hidden := [part for part in found.relative_to(top).parts if part.startswith(".") or part in HIDDEN]:
        raise BadInput(
            f"recipe: {key} = {text[:200]!r}: {hidden[0]!r} is the server's or a run's own: want another path"
        )
