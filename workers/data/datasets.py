"""Typed rows of a data file, in the shapes common on the Hugging Face Hub, checked before any model is loaded.

    Problem         prompt | messages
    Demonstration   prompt + response | prompt + completion | messages | text
    Preference      prompt + chosen + rejected | chosen + rejected, whose shared beginning is the prompt

A row type is a struct with the fields that a training step needs. `columns` maps them to the names in the file; other
fields of a row are ignored. A prompt or an answer is a text, or chat messages that the tokenizer's template renders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import msgspec

from workers.data.chat import BadChat, ChatTemplate, Message
from workers.data.dataset_files import DataError, Record, records

__all__ = ["DataError", "Demonstration", "Preference", "Problem", "SafetyPair", "read_rows"]


class Problem(msgspec.Struct, frozen=True):
    """A prompt to answer. `reference` is for rules and evaluation, "" if there is none."""

    prompt: str
    reference: str = ""


class Demonstration(msgspec.Struct, frozen=True):
    """A prompt and the response to imitate; a plain text has an empty prompt."""

    prompt: str
    response: str


class Preference(msgspec.Struct, frozen=True):
    """Two responses to one prompt; `chosen` is the better one.

    A truncated response was cut off by a token limit and gets no end-of-sequence token.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_truncated: bool = False
    rejected_truncated: bool = False


class SafetyPair(msgspec.Struct, frozen=True):
    """Two responses to one prompt; `chosen` is the safer one. None: it is not labelled as safe or unsafe."""

    prompt: str
    chosen: str
    rejected: str
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None
    chosen_truncated: bool = False
    rejected_truncated: bool = False


R = TypeVar("R", bound=msgspec.Struct)

_OTHER_NAMES = {"prompt": ("messages",), "response": ("completion",)}
_ANSWERS = ("response", "chosen", "rejected")


def read_rows(
    path: str | Path,
    kind: type[R],
    columns: Mapping[str, str] | None = None,
    tokenizer: str | Path = "",
) -> list[R]:
    """All rows of a file or folder (see workers.data.dataset_files).

    `columns` maps a field of `kind` to its name in the file, where the two differ. `tokenizer` is the transformers
    folder whose chat template renders messages. Raises DataError for a file that can't be read or holds no row, and
    for the first row that lacks a field of the right type.
    """
    names = {field.name: (columns or {}).get(field.name, field.name) for field in msgspec.structs.fields(kind)}
    if unknown := set(columns or {}) - set(names):
        raise DataError(f"{path}: {sorted(unknown)[0]!r} is no field of {kind.__name__}; it has {', '.join(names)}")
    template = ChatTemplate(tokenizer)
    rows = [_row(record, kind, names, template) for record in records(path)]
    if not rows:
        raise DataError(f"{path}: holds no row")
    return rows


def _row(record: Record, kind: type[R], names: Mapping[str, str], template: ChatTemplate) -> R:
    found = _found(record.values, names)
    try:
        return msgspec.convert(_as_texts(found, names, template), kind)
    except msgspec.ValidationError as error:
        raise _complaint(record, kind, names, found, error) from error
    except BadChat as error:
        raise DataError(f"{record.place}: {error}") from error


def _found(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Field -> its value, under the given name or one that is common on the Hub."""
    found: dict[str, Any] = {}
    for field, name in names.items():
        others = _OTHER_NAMES.get(field, ()) if name == field else ()
        if there := next((n for n in (name, *others) if n in values), None):
            found[field] = values[there]
    if "response" in names and "response" not in found and names.get("prompt") == "prompt":
        if "messages" in values:  # also where the row repeats the first of them as its prompt
            found["prompt"] = values["messages"]
        elif "prompt" not in found and "text" in values and "text" not in names:
            found |= {"prompt": "", "response": values["text"]}
    return found


def _as_texts(found: dict[str, Any], names: Mapping[str, str], template: ChatTemplate) -> dict[str, Any]:
    """The fields with every conversation rendered as text; fields inside a conversation are taken from it."""
    answers = [field for field in _ANSWERS if field in names]
    for field in ("prompt", *answers):
        if isinstance(value := found.get(field), list) and not is_chat(value):
            raise BadChat(
                f"the {field} is a list: want chat messages, each with a role and a content, got {value!r:.100}"
            )
    if "chosen" in names and all(field in found for field in answers):
        found = _with_prompt(found)
    prompt = request = found.get("prompt")
    if is_chat(prompt) and not any(field in found for field in answers):
        if "response" in names:
            found = {**found, "response": prompt[-1:]}
        if "response" in names or prompt[-1]["role"] == "assistant":  # the policy answers anew
            request = prompt[:-1]
    if not (is_chat(prompt) or any(is_chat(found.get(field)) for field in answers)):
        return found
    conversation = _messages(request)
    texts = {**found, "prompt": template.prompt(conversation)}
    for field in answers:
        answer = found.get(field)
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if is_chat(answer):
            texts[field] = template.reply(conversation, answer)
    return texts


def _with_prompt(found: dict[str, Any]) -> dict[str, Any]:
    """A pair with a prompt: the given one, or the shared beginning of both answers.

    Answers that are whole conversations contain the prompt, even if the row repeats it.
    """
    chosen, rejected = found["chosen"], found["rejected"]
    whole = is_chat(chosen) and is_chat(rejected) and chosen[0].get("role") != "assistant"
    if "prompt" in found and not whole:
        return found
    if whole:
        shared = _shared(chosen[:-1], rejected[:-1])
    elif isinstance(chosen, str) and isinstance(rejected, str):
        common = chosen[: _shared(chosen, rejected)]
        shared = len(common) - len(re.split(r"(?=\s)", common)[-1])  # no word is split
    else:
        return found
    return {**found, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The number of leading items that two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def is_chat(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _messages(prompt: Any) -> list[Message]:
    """A prompt as messages; a text becomes a message of the user."""
    if is_chat(prompt):
        return list(prompt)
    return [{"role": "user", "content": prompt}] if prompt else []


def _complaint(
    record: Record, kind: type[R], names: Mapping[str, str], found: Mapping[str, Any], error: msgspec.ValidationError
) -> DataError:
    """The error of a row: the field that it lacks and the accepted shapes, or the field of a wrong type."""
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in found:
            has = ", ".join(map(repr, record.values)) or "none"
            return DataError(
                f"{record.place}: no field {names[field.name]!r}; the row has {has}; "
                f"want {_shapes(names)}, or the names that the file has for them"
            )
    return DataError(f"{record.place}: {error}")


def _shapes(names: Mapping[str, str]) -> str:
    """The accepted shapes of rows of a kind, for an error message."""
    if "chosen" in names:
        return "prompt + chosen + rejected, or chosen + rejected"
    if "response" in names:
        return "prompt + response, prompt + completion, messages, or text"
    return " and ".join(["prompt or messages", *(name for name in names if name != "prompt")])
