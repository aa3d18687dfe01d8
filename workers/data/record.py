"""One raw row of a data file, before anybody asks for its fields."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import msgspec


class DataError(ValueError):
    """A data file that can't be used. The message names file, row and what is wrong."""


class Record(NamedTuple):
    """One raw row."""

    place: str  # for errors: line "x.jsonl:3" or row "x.parquet: row 3", both counted from 1
    values: dict[str, Any]  # without nulls, at any depth


class Unreadable(msgspec.Struct, frozen=True):
    """A cell of a table that Python has no value for."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def without_nulls(value: Any) -> Any:
    """The value without the nulls of its objects, at any depth: tables have one wherever another row has a value."""
    match value:
        case dict():
            items = cast(dict[str, Any], value).items()
            return {key: without_nulls(inner) for key, inner in items if inner is not None}
        case list():
            return [without_nulls(inner) for inner in cast(list[Any], value)]
        case _:
            return value
