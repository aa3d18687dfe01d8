"""The reference of all settings, made from the types: each key with its type, bounds, default and meaning.

The meaning of a key is the comment beside its field, and any lines of comment right above it. It is read from the
source, so that a settings struct stays as readable as a recipe: `Meta(description=...)` would hide names and defaults
behind the text. An installed package has its sources.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_type_hints

import msgspec
from msgspec import NODEFAULT
from msgspec.inspect import (
    BoolType,
    DictType,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    NoneType,
    StrType,
    StructType,
    Type,
    UnionType,
    type_info,
)

from asyncflow.dataflow.algorithms import ALGORITHMS
from asyncflow.dataflow.trace import declaration_of, defaults_of, trace
from asyncflow.recipe.config import BadInput, Recipe
from asyncflow.recipe.field_comments import comments_of
from workers.advantages.adaptive_kl import KL_COEFFICIENT, KlSteering
from workers.finetune.settings import RewardModelSettings, SftSettings
from workers.settings import Loss, Settings, violated_bound

ROOTS: dict[str, type[Settings]] = {"recipe": Recipe, "sft": SftSettings, "reward-model": RewardModelSettings}

OF_ALGORITHMS = " of an algorithm"  # the end of a table's key

# The keys of these tables are names; this is what they name.
_NAMED = {
    "models": "role",
    "pools": "pool",
    "placement": "service",
    "delays": "service",
    "columns": "field",
    "eval": "set",
}


class Setting(msgspec.Struct, frozen=True):
    """One key."""

    key: str  # full, e.g. "loss.clip_low", "models.<role>.path"
    type: str  # in words, with its bounds: "integer, 1 or more"
    default: str  # as TOML; "" where the key is required
    meaning: str


class Table(msgspec.Struct, frozen=True):
    """A table of settings; `key` is "" for those at the top of the file."""

    key: str
    meaning: str
    settings: list[Setting]


def tables(root: str) -> list[Table]:
    """All tables of one file of `ROOTS`: its top first, then table by table in the order of their keys.

    Those of a recipe end with what the algorithms make of [advantage] and [loss].
    """
    found = list(_tables(ROOTS[root], "", None))
    return [*found, *_of_algorithms()] if root == "recipe" else found


def find(key: str) -> list[Table]:
    """A key, a table, or all keys of a file: "loss.clip_low", "models.policy", "sft", "sft.schedule.steps".

    A recipe's keys need no prefix. Raises BadInput for an unknown one, with the nearest.
    """
    root, _, rest = key.partition(".")
    if root not in ROOTS:
        root, rest = "recipe", key
    found = tables(root)
    if not rest:
        return found
    below = [table for table in found if _covers(rest, table.key.removesuffix(OF_ALGORITHMS))]
    if below:
        return below
    named = [
        msgspec.structs.replace(table, settings=own)
        for table in found
        if (own := [setting for setting in table.settings if _names(rest, setting.key)])
    ]
    if named:
        return named
    named_tables = {table.key.removesuffix(OF_ALGORITHMS) for table in found if table.key}
    known = named_tables | {setting.key for table in found for setting in table.settings}
    prefix = "" if root == "recipe" else f"{root}."
    close = get_close_matches(key, sorted(prefix + name for name in _as_asked(rest, known)), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"`asyncflow settings{prefix and f' {root}'}` prints all"
    raise BadInput(f"settings: no key {key}, {hint}")


def markdown_page() -> str:
    """The reference of all files as one page."""
    lines = [
        "# Settings",
        "",
        "Every key of a recipe, and of the settings of SFT and of a reward or cost model. A key without a default is "
        "required. `asyncflow settings KEY` prints one key or table. This page is generated from the types: "
        "`asyncflow settings --format markdown > SETTINGS.md`.",
    ]
    titles = {"recipe": "A recipe", "sft": "SFT", "reward-model": "A reward or cost model"}
    for root, title in titles.items():
        command = "run" if root == "recipe" else root
        lines += ["", f"## {title}: `asyncflow {command}`", "", to_markdown(tables(root))]
    return "\n".join(lines)


def to_markdown(found: list[Table]) -> str:
    """Tables of settings as markdown."""
    lines: list[str] = []
    for table in found:
        name, of, _ = table.key.partition(OF_ALGORITHMS)
        lines += [f"### `[{name}]`{of}", ""] if table.key else []
        lines += [table.meaning, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for s in table.settings:
            cells = [f"`{s.key}`", s.type, f"`{s.default}`" if s.default else "", s.meaning]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines[:-1])


def _tables(kind: type[msgspec.Struct], key: str, defaults: object) -> Iterator[Table]:
    """A struct's own settings, then the tables inside. `defaults`: an instance, where the table has a default."""
    info = type_info(kind)
    assert isinstance(info, StructType)
    comments = comments_of(kind)
    settings, inner = list[Setting](), list[tuple[type[msgspec.Struct], str, object]]()
    for field in info.fields:
        default: Any = getattr(defaults, field.name) if defaults is not None else field.default
        if defaults is None and field.default_factory is not NODEFAULT:
            default = field.default_factory()
        name = f"{key}.{field.encode_name}" if key else field.encode_name
        match field.type:
            case StructType(cls=below):
                inner.append((below, name, None if default is NODEFAULT else default))
                continue
            case DictType(value_type=StructType(cls=below)):
                inner.append((below, f"{name}.<{_NAMED[field.name]}>", None))
            case ListType(item_type=StructType(cls=below)):
                inner.append((below, f"{name}[]", None))
            case UnionType(types=kinds):  # a value of its own, or a list or a table of tables
                items = [kind.item_type for kind in kinds if isinstance(kind, ListType)]
                inner += [(item.cls, f"{name}[]", None) for item in items if isinstance(item, StructType)]
                inner += [(below, f"{name}.<{_NAMED[field.name]}>", None) for below in _tables_in(kinds)]
            case _:
                pass
        settings.append(Setting(name, _type(field.type), _default(default), comments.get(field.name, "")))
    yield Table(key, _first_paragraph(kind), settings)
    for below, name, instance in inner:
        yield from _tables(below, name, instance)


def _tables_in(kinds: tuple[Type, ...]) -> list[type[msgspec.Struct]]:
    """The structs that are values of a table, where a union has such a table."""
    values = [kind.value_type for kind in kinds if isinstance(kind, DictType)]
    members = [member for value in values for member in (value.types if isinstance(value, UnionType) else (value,))]
    return [member.cls for member in members if isinstance(member, StructType)]


def _of_algorithms() -> Iterator[Table]:
    """The keyword arguments of the algorithms' batch functions, and their own defaults of the loss."""
    arguments, losses = dict[tuple[str, str, str], list[str]](), dict[tuple[str, str, str], list[str]]()
    for name, algorithm in ALGORITHMS.items():
        declared, function = declaration_of(algorithm), trace(algorithm).batch_stage.function
        assert function is not None
        hints = get_type_hints(function)
        known = defaults_of(function) | dict(declared.advantage)
        if KL_COEFFICIENT in known:
            known |= msgspec.structs.asdict(KlSteering())
            hints |= get_type_hints(KlSteering)
        for key, value in known.items():
            kind = _type(type_info(hints.get(key, type(value))))
            arguments.setdefault((key, kind, _default(value)), []).append(name)
        for key, value in msgspec.structs.asdict(declared.loss).items():
            if value != getattr(Loss(), key):
                kind = _type(type_info(get_type_hints(Loss, include_extras=True)[key]))
                losses.setdefault((key, kind, _default(value)), []).append(name)
    for table, of, title in (
        ("advantage", arguments, "Keyword arguments of the batch function, by algorithm."),
        ("loss", losses, "Defaults that differ from the table above, by algorithm."),
    ):
        settings = [Setting(f"{table}.{key}", kind, value, ", ".join(who)) for (key, kind, value), who in of.items()]
        yield Table(f"{table}{OF_ALGORITHMS}", title, sorted(settings, key=lambda setting: setting.key))


def _type(kind: Type) -> str:
    """A type in words, with its bounds."""
    bound = violated_bound(kind, float("nan"))
    if bound.endswith("number"):  # "a finite number"
        return bound
    return ", ".join(filter(None, (_word(kind), bound)))


def _word(kind: Type) -> str:
    match kind:
        case LiteralType(values=values):
            word = " or ".join(f'"{value}"' for value in values)
        case ListType(item_type=item):
            word = f"list of {_type(item)}"
        case DictType(value_type=value):
            word = f"table of {_type(value)}"
        case UnionType(types=kinds):
            word = " or ".join(_type(member) for member in kinds if not isinstance(member, NoneType))
        case _:
            word = _WORDS.get(type(kind), type(kind).__name__)
    return word


_WORDS: dict[type[Type], str] = {
    BoolType: "true or false",
    IntType: "integer",
    FloatType: "number",
    StrType: "text",
    StructType: "tables",
}


def _default(value: Any) -> str:
    """A default as TOML; "" for a required key, "none" for one whose meaning says where its value comes from."""
    if value is NODEFAULT:
        return ""
    if value is None:
        return "none"
    plain = msgspec.to_builtins(value)
    if isinstance(plain, dict):
        inner = ", ".join(f"{key} = {_default(inner)}" for key, inner in plain.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(plain, list):
        return f"[{', '.join(map(_default, plain))}]"
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        return msgspec.json.encode(plain).decode()
    return repr(plain)


def _covers(asked: str, table: str) -> bool:
    """Whether a table is the one asked for, or inside of it."""
    parts, own = asked.split("."), _parts(table)
    return len(own) >= len(parts) and all(map(_part_names, parts, own))


def _names(asked: str, key: str) -> bool:
    parts, own = asked.split("."), _parts(key)
    return len(own) == len(parts) and all(map(_part_names, parts, own))


def _parts(key: str) -> list[str]:
    return key.split(".") if key else []


def _part_names(asked: str, own: str) -> bool:
    return asked == own.removesuffix("[]") or own.startswith("<")


def _as_asked(asked: str, known: set[str]) -> list[str]:
    """The known keys, with the names that the asked one has in the place of `<role>` and the like."""
    parts = asked.split(".")
    return [
        ".".join(
            parts[i] if own.startswith("<") and i < len(parts) else own.removesuffix("[]")
            for i, own in enumerate(_parts(key))
        )
        for key in known
    ]


def _first_paragraph(kind: type[msgspec.Struct]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
