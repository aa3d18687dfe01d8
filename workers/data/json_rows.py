"""Reads the rows of JSON text: one object a line, an array of objects, or one object that holds such arrays.

    {"prompt": "1+1="}                                         one line, one row
    [{"prompt": "1+1="}, ...]                                  an array
    {"version": 1, "data": [{"prompt": "1+1="}, ...]}          an object that holds all rows under a name (.json only)
    {"train": [{...}, ...], "test": [{...}, ...]}              several arrays: x.json/train is one of them

Chat messages are no rows: {"messages": [{"role": ...}]} is one row, as is every object with a prompt.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec

from workers.data.messages import is_chat
from workers.data.record import DataError, Record, without_nulls

# Names under which an object is known to hold rows, whatever else it has: all of its file's, or those of one split.
_LISTS = ("data", "rows", "examples", "instances")
_SPLITS = ("train", "training", "test", "testing", "eval", "validation", "valid", "dev", "val")
_ROW = ("prompt", "response", "completion", "messages", "conversations", "conversation", "chosen", "rejected", "text")
_COLUMNS = {*_ROW, "instruction", "question", "problem", "query", "input"}  # of an object that is a row itself
_Arrays = dict[str, list[dict[str, Any]]]
_JSON = msgspec.json.Decoder(dict[str, Any])


def json_lines(path: Path, file: Any) -> Iterator[Record]:
    """The rows of a file of lines; an array that starts with an object is one of rows, as some tools write it."""
    number, line = _first_line(file)
    if line.lstrip().startswith(b"[{"):
        yield from _array(str(path), line + file.read())
        return
    yield from _lines(path, line, file, number)


def json_value(path: Path, file: Any, name: str = "") -> Iterator[Record]:
    """The rows of a .json file: an array, an object that holds arrays, or lines. Arrays are read into memory.

    `name` chooses one of several arrays. Raises DataError where there are several and none is named, or no such one.
    """
    number, line = _first_line(file)
    first = line.strip()
    if first.startswith(b"["):
        if name:
            raise DataError(f"{path}/{name}: the file is one array of rows: name it alone, {path}")
        yield from _array(str(path), line + file.read())
        return
    if first.startswith(b"{") and (name or _arrays_in(first) != {}):  # else it is the first of many lines
        line += file.read()
        arrays = _arrays_in(line)
        if arrays:
            place, rows = _chosen(path, arrays, name)
            yield from (Record(f"{place}: row {i}", without_nulls(row)) for i, row in enumerate(rows, 1))
            return
        if arrays is not None and not name:
            yield from _array(str(path), b"[%b]" % line)
            return
        file = io.BytesIO(line)  # its first line looked like such an object, and is the first of several
        line = file.readline()
    if name:
        raise DataError(f"{path}/{name}: the file holds no arrays of rows by name: name it alone, {path}")
    yield from _lines(path, line, file, number)


def _first_line(file: Any) -> tuple[int, bytes]:
    """The first line that is not empty, and the number of lines before it."""
    number = 0
    while (line := file.readline()) and not line.strip():
        number += 1
    return number, line


def _lines(path: Path, line: bytes, file: Any, number: int) -> Iterator[Record]:
    while line:
        number += 1
        if line.strip():
            yield _object(line, f"{path}:{number}")
        line = file.readline()


# --- an object that holds arrays


def _arrays_in(text: bytes) -> _Arrays | None:
    """The arrays of rows that the one object of a text holds, by name; {} if it is a row, None if it is no object."""
    try:
        values = _JSON.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        values = _with_constants_or_none(text)
    if not isinstance(values, dict):
        return None
    given = cast(dict[str, Any], values)
    if _COLUMNS & given.keys():
        return {}
    arrays = {name: value for name, value in given.items() if _holds_rows(value)}
    known = {name: array for name, array in arrays.items() if name in (*_LISTS, *_SPLITS)}
    return known or (arrays if len(arrays) == len(given) else {})


def _holds_rows(value: Any) -> bool:
    """Whether a value is an array of objects that are no chat messages; an empty one counts."""
    return isinstance(value, list) and all(isinstance(v, dict) for v in cast(list[Any], value)) and not is_chat(value)


def _chosen(path: Path, arrays: _Arrays, name: str) -> tuple[str, list[dict[str, Any]]]:
    """The array of that name, or the only one there is, and its place. Raises DataError."""
    if name in arrays:
        return f"{path}/{name}", arrays[name]
    if len(arrays) == 1 and not name:
        return str(path), next(iter(arrays.values()))
    found = f"holds rows under {' and '.join(arrays)}: name one: {', '.join(f'{path}/{array}' for array in arrays)}"
    raise DataError(f"{path / name}: not in the file, which {found}" if name else f"{path}: {found}")


# --- values


def _array(place: str, data: bytes) -> Iterator[Record]:
    try:
        objects: list[Any] = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        objects = _with_constants(data, f"{place}: not a JSON array of objects: {error}")
    for number, raw in enumerate(objects, 1):
        row = f"{place}: row {number}"
        if isinstance(raw, dict):
            yield Record(row, without_nulls(raw))
        else:
            yield _object(bytes(raw) if isinstance(raw, msgspec.Raw) else json.dumps(raw).encode(), row)


def _object(text: bytes, place: str) -> Record:
    try:
        return Record(place, without_nulls(_JSON.decode(text)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        complaint = f"{place}: not a JSON object: {error}"
        if "truncated" in complaint and not text.endswith(b"\n"):
            complaint += ": the last line is cut off, so the file is incomplete"
        elif text.strip() == b"{":
            complaint += ": want each object on one line, or one array of objects"
        values = _with_constants(text, complaint)
        if not isinstance(values, dict):
            raise DataError(complaint) from error
        return Record(place, without_nulls(values))


def _with_constants(text: bytes, complaint: str) -> Any:
    """JSON with NaN and Infinity, which Python and pandas write. Raises DataError with this complaint."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise DataError(complaint) from error
    return value


def _with_constants_or_none(text: bytes) -> Any:
    try:
        return _with_constants(text, "")
    except DataError:
        return None
