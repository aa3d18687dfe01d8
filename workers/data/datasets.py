"""Typed rows of a data file, checked before any model is loaded.

A row type is a struct with the fields that a training step needs. `columns` maps them to the names in the file; other
columns of a row are ignored. A prompt or an answer is a text, which stays as it is, or chat messages, which the
tokenizer's template renders; `is_chat` marks such rows, which have its special tokens. `workers.data.row_shapes` has
the shapes that are read without `columns`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from workers.data.chat import ChatTemplate
from workers.data.dataset_files import DataError, Record, records
from workers.data.file_rows import json_of
from workers.data.messages import BadChat
from workers.data.row_shapes import IS_CHAT, fields_of, names_in, shapes_for
from workers.settings import Chat

__all__ = ["ALL", "DataError", "Demonstration", "MissingField", "Preference", "Problem", "SafetyPair", "read_rows"]


class Problem(msgspec.Struct, frozen=True):
    """A prompt to answer. `reference` is for rules and evaluation, "" if there is none.

    A conversation that ends with an answer of the assistant is asked anew; where the row has no other reference, that
    answer is it.
    """

    prompt: str
    reference: str = ""
    is_chat: bool = False


class Demonstration(msgspec.Struct, frozen=True):
    """A prompt and the response to imitate; a plain text has an empty prompt."""

    prompt: str
    response: str
    is_chat: bool = False


class Preference(msgspec.Struct, frozen=True):
    """Two responses to one prompt; `chosen` is the better one.

    A truncated response was cut off by a token limit and gets no end token.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    is_chat: bool = False


class SafetyPair(msgspec.Struct, frozen=True):
    """Two responses to one prompt; `chosen` is the safer one. None: it is not labelled as safe or unsafe."""

    prompt: str
    chosen: str
    rejected: str
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    is_chat: bool = False


R = TypeVar("R", bound=msgspec.Struct)

ALL = "*"


class MissingField(DataError):
    """A row has none of the columns that a field may have. The message names the row's columns."""


def read_rows(
    path: str | Path,
    kind: type[R],
    columns: Mapping[str, str] | None = None,
    tokenizer: str | Path = "",
    chat: Chat = Chat(),  # noqa: B008 - frozen
    *,
    keep: Collection[str] = (),
) -> list[R]:
    """All rows of a file or folder (see workers.data.dataset_files), in any shape of workers.data.row_shapes.

    `columns` maps a field of `kind` to its name in the file, where the two differ. `tokenizer` is the transformers
    folder whose chat template renders messages, as `chat` says. `keep` names columns whose values the field `columns`
    of `kind` gets, as JSON types; `ALL` stands for all of them. Raises DataError for a file that can't be read or holds
    no row, and for the first row that lacks a field of the right type.
    """
    fields = [field.name for field in msgspec.structs.fields(kind) if field.name not in (KEPT, IS_CHAT)]
    names = {field: (columns or {}).get(field, field) for field in fields}
    if unknown := set(columns or {}) - set(names):
        raise DataError(f"{path}: {sorted(unknown)[0]!r} is no field of {kind.__name__}; it has {', '.join(names)}")
    template = ChatTemplate(tokenizer, chat)
    rows = [_row(record, kind, names, template, keep) for record in records(path)]
    if not rows:
        raise DataError(f"{path}: holds no row")
    return rows


KEPT = "columns"  # the field of a row that has other columns of the file


def _row(record: Record, kind: type[R], names: Mapping[str, str], template: ChatTemplate, keep: Collection[str]) -> R:
    found: dict[str, Any] = {}
    try:
        found = fields_of(record.values, names, template)
        if keep:
            found[KEPT] = _kept(record.values, keep)
        return msgspec.convert(found, kind, strict=False)  # a table of texts has true and 1 as text
    except msgspec.ValidationError as error:
        raise _complaint(record, kind, names, found, error) from error
    except BadChat as error:
        raise DataError(f"{record.place}: {error}") from error


def _kept(values: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
    """The columns of these names as JSON types: times, decimals and bytes (base64) as text; a NaN is left out."""
    kept = {name: value for name, value in values.items() if ALL in keep or name in keep}
    plain = msgspec.json.decode(json_of(kept))
    return {name: value for name, value in plain.items() if value is not None}


def _complaint(
    record: Record, kind: type[R], names: Mapping[str, str], found: Mapping[str, Any], error: msgspec.ValidationError
) -> DataError:
    """The error of a row: the field that it lacks and the accepted shapes, or the field of a wrong type."""
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in found:
            return MissingField(
                f"{record.place}: no field {names[field.name]!r}; the row has {names_in(record.values)}; "
                f"want {shapes_for(names)}, or the names that the file has for them"
            )
    return DataError(f"{record.place}: {error}")
