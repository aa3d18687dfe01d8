"""The shapes that rows have on the Hugging Face Hub: which of a row's columns become which field.

    prompt + response | prompt + completion                   texts or messages
    messages | conversations | conversation                   messages, see workers.data.messages
    instruction (+ input) + output                            Alpaca: instruction and input become the prompt, as text
    prompt + chosen + rejected | chosen + rejected            whose shared beginning is the prompt
    text                                                      without a prompt

A name may lead into a column, "reward_model.ground_truth", and into a list, "conversations.1.value" ("-1": the last).
A number where a text is wanted becomes its text: 7 and 7.0 are "7", 0.5 is "0.5", true is "true".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, cast

import msgspec

from workers.data.chat import ChatTemplate
from workers.data.messages import BadChat, Message, conversation, is_chat
from workers.data.record import Unreadable

CONVERSATIONS = ("messages", "conversations", "conversation")
_OTHER_NAMES = {"prompt": CONVERSATIONS, "response": ("completion",)}
_ANSWERS = ("response", "chosen", "rejected")
_NUMBERS_AS_TEXT = ("reference", "response")
_MOST_NAMES = 20  # named in an error


def fields_of(values: Mapping[str, Any], names: Mapping[str, str], template: ChatTemplate) -> dict[str, Any]:
    """Field -> its value for the fields that a row has; conversations are rendered as text.

    `names` maps every field to its column. Raises BadChat for messages that can't be rendered.
    """
    return _as_texts(_found(values, names), names, template, values)


def value_of(values: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a dotted name inside one; None if the row has none."""
    if name in values or "." not in name:
        return values.get(name)
    value: Any = values
    for part in name.split("."):
        if isinstance(value, str) and value[:1] in ("{", "["):
            value = _decoded(value)  # a column that holds JSON as text
        if isinstance(value, Mapping):
            value = cast(Mapping[str, Any], value).get(part)
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", part):
            items = cast(list[Any], value)
            value = items[int(part)] if -len(items) <= int(part) < len(items) else None
        else:
            return None
    return value


def names_in(values: Mapping[str, Any]) -> str:
    """The columns of a row and the dotted names inside them, for an error message."""
    names = list(_names(values, ""))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(map(repr, names[:_MOST_NAMES])) or "none") + more


def shapes_for(names: Mapping[str, str]) -> str:
    """The accepted shapes of rows with these fields, for an error message."""
    if "chosen" in names:
        return "prompt + chosen + rejected, or chosen + rejected"
    if "response" in names:
        return "prompt + response, prompt + completion, messages, conversations, instruction + output, or text"
    others = (name for name in names if name not in ("prompt", "columns"))
    return " and ".join(["prompt, messages or conversations", *others])


# --- which column


def _found(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Field -> its value, under the given name or one that is common on the Hub."""
    found: dict[str, Any] = {}
    for field, name in names.items():
        others = _OTHER_NAMES.get(field, ()) if name == field else ()
        for column in (name, *others):
            value = value_of(values, column)
            if isinstance(value, Unreadable):
                raise BadChat(f"column {column!r} can't be read: {value}")
            if value is not None and not _is_nan(value):
                found[field] = _conversation_of(value, values, column) if field in ("prompt", *_ANSWERS) else value
                break
    if "response" in names and "response" not in found and names.get("prompt") == "prompt":
        if column := next((name for name in CONVERSATIONS if name in values), None):
            found["prompt"] = _conversation_of(values[column], values, column)  # the row may repeat it as its prompt
        elif "prompt" not in found and "text" in values and "text" not in names:
            found |= {"prompt": "", "response": values["text"]}
    if "prompt" not in found and names.get("prompt") == "prompt" and isinstance(values.get("instruction"), str):
        found = _alpaca(values, names) | found
    return found | {field: as_text(found[field]) for field in _NUMBERS_AS_TEXT if field in found}


def _alpaca(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    extra = values.get("input")
    found: dict[str, Any] = {"prompt": values["instruction"] + (f"\n{extra}" if extra else "")}
    if "response" in names and "output" in values and names["response"] == "response":
        found["response"] = values["output"]
    return found


def _conversation_of(value: Any, values: Mapping[str, Any], column: str) -> Any:
    """A conversation in one form, also one message alone or messages as JSON; other values stay. Raises BadChat."""
    if isinstance(value, str) and (column in CONVERSATIONS or value.startswith('[{"')):
        decoded = _decoded(value)
        if column in CONVERSATIONS and not is_chat(decoded):
            raise BadChat(f"{column} is a text: want a list of messages, or the list as JSON, got {value!r:.100}")
        value = decoded if is_chat(decoded) else value
    messages: Any = [value] if is_chat([value]) else value
    if not is_chat(messages):
        return value
    chat = conversation(messages)
    system = values.get("system") if column in CONVERSATIONS else None  # ShareGPT's, in a column of its own
    if isinstance(system, str) and system and all(message["role"] != "system" for message in chat):
        return [{"role": "system", "content": system}, *chat]
    return chat


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def _names(values: Mapping[str, Any], above: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _names(cast(dict[str, Any], value), f"{above}{name}.")
        else:
            yield f"{above}{name}"


# --- texts


def as_text(value: Any) -> Any:
    """A number, bool or date as text; any other value as it is."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float() | Decimal() if math.isfinite(value):
            return str(int(value)) if value == int(value) else str(value)
        case float() | Decimal():
            return str(value)
        case date() | time():
            return value.isoformat()
        case _:
            return value


def _is_nan(value: Any) -> bool:
    """Whether a value is NaN, which tables have for an absent one."""
    return isinstance(value, float) and math.isnan(value)


IS_CHAT = "is_chat"  # the field of a row that says whether the chat template has rendered it


def _as_texts(
    found: dict[str, Any], names: Mapping[str, str], template: ChatTemplate, row: Mapping[str, Any]
) -> dict[str, Any]:
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
            if names.get("reference") == "reference":
                found = {"reference": prompt[-1]["content"] or "", **found}
    chat = is_chat(prompt) or any(is_chat(found.get(field)) for field in answers)
    if not (chat or (isinstance(prompt, str) and template.takes(prompt))):
        return found
    before = _messages(request)
    arguments = template.arguments_of(row)
    replies = {field: answer for field in answers if is_chat(answer := _answer(found.get(field)))}
    prompt, texts = template.exchange(before, list(replies.values()), arguments)
    return {**found, IS_CHAT: True, "prompt": prompt, **dict(zip(replies, texts, strict=True))}


def _answer(answer: Any) -> Any:
    """An answer as messages; a text becomes a message of the assistant."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _with_prompt(found: dict[str, Any]) -> dict[str, Any]:
    """A pair with a prompt: the given one, or the shared beginning of both answers.

    Answers that are whole conversations contain the prompt, even if the row repeats it.
    """
    chosen, rejected = found["chosen"], found["rejected"]
    whole = is_chat(chosen) and is_chat(rejected) and chosen[0]["role"] != "assistant"
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


def _messages(prompt: Any) -> list[Message]:
    """A prompt as messages; a text becomes a message of the user."""
    if is_chat(prompt):
        return list(prompt)
    return [{"role": "user", "content": prompt}] if prompt else []
