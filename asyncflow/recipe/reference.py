"""The reference of all settings, made from the types: each key with its type, bounds, default and meaning.

The meaning of a key is the comment beside its field, and any lines of comment right above it. It is read from the
source, so that a settings struct stays as readable as a recipe: `Meta(description=...)` would hide names and defaults
behind the text. An installed package has its sources.
"""

from __future__ import annotations

import ast
import inspect
import tokenize
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from io import StringIO
from textwrap import dedent
from typing import Any

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

from asyncflow.recipe.config import BadInput, Recipe
from workers.finetune.settings import RewardModelSettings, SftSettings
from workers.settings import Settings, violated_bound

ROOTS: dict[str, type[Settings]] = {"recipe": Recipe, "sft": SftSettings, "reward-model": RewardModelSettings}

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
    """All tables of one file of `ROOTS`: its top first, then table by table in the order of their keys."""
    return list(_tables(ROOTS[root], "", None))


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
    below = [table for table in found if _covers(rest, table.key)]
    if below:
        return below
    for table in found:
        for setting in table.settings:
            if _names(rest, setting.key):
                return [msgspec.structs.replace(table, settings=[setting])]
    known = {table.key for table in found if table.key} | {setting.key for table in found for setting in table.settings}
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
        lines += [f"### `[{table.key}]`", ""] if table.key else []
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
    comments = _comments_of(kind)
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


@cache
def _comments_of(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> the comment right above it and the one beside it, for inherited fields as well."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Settings) and base is not Settings:
            found |= _own_comments(dedent(inspect.getsource(base)))
    return found


def _own_comments(source: str) -> dict[str, str]:
    lines = source.splitlines()
    above, beside = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            alone = not lines[row - 1][:column].strip()
            (above if alone else beside)[row] = token.string.lstrip("# ")
    (struct,) = ast.parse(source).body
    assert isinstance(struct, ast.ClassDef)
    found: dict[str, str] = {}
    for node in struct.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first = node.lineno
        while first - 1 in above:
            first -= 1
        texts = [above[row] for row in range(first, node.lineno)]
        texts += [beside[row] for row in range(node.lineno, (node.end_lineno or node.lineno) + 1) if row in beside]
        found[node.target.id] = " ".join(texts)
    return found
