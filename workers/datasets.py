"""Rows of a JSON-lines file, typed and checked before anything heavy is loaded.

A row type is a struct; its fields are what a step needs. `columns` says under which names the file keeps them;
whatever else a row holds is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec


class DataError(ValueError):
    """A data file that can't be used. The message names file, line and what is wrong."""


class Problem(msgspec.Struct, frozen=True):
    """A prompt to answer. `reference` is for rules and evaluation, "" where there is none."""

    prompt: str
    reference: str = ""


class Demonstration(msgspec.Struct, frozen=True):
    """A prompt and the response to imitate."""

    prompt: str
    response: str


class Preference(msgspec.Struct, frozen=True):
    """Two responses to one prompt, `chosen` the better.

    A truncated response was cut off by a token limit: it gets no end-of-sequence token.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_truncated: bool = False
    rejected_truncated: bool = False


R = TypeVar("R", bound=msgspec.Struct)


def read_rows(path: str | Path, kind: type[R], columns: Mapping[str, str] | None = None) -> list[R]:
    """All rows of a file, one JSON object a line; empty lines are skipped.

    `columns` maps a field of `kind` to its name in the file, where the two differ. Raises DataError for a file that
    can't be read or holds no row, and for the first row that is no JSON object or lacks a field of the right type.
    """
    names = {field.name: (columns or {}).get(field.name, field.name) for field in msgspec.structs.fields(kind)}
    if unknown := set(columns or {}) - set(names):
        raise DataError(f"{path}: {sorted(unknown)[0]!r} is no field of {kind.__name__}; it has {', '.join(names)}")
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    rows = [_row(line, kind, names, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no row")
    return rows


_JSON = msgspec.json.Decoder(dict[str, Any])


def _row(line: bytes, kind: type[R], names: Mapping[str, str], place: str) -> R:
    try:
        row = _JSON.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object: {error}") from error
    for field in msgspec.structs.fields(kind):
        if field.required and names[field.name] not in row:
            raise DataError(
                f"{place}: no field {names[field.name]!r}; the row has {', '.join(map(repr, row)) or 'none'}"
            )
    try:
        return msgspec.convert({field: row[name] for field, name in names.items() if name in row}, kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{place}: {error}") from error
