"""Chat messages in the forms that data sets have, brought into the one form that chat templates read.

{"role": "user", "content": "1+1"}                                  OpenAI and transformers: stays as it is
{"role": "user", "content": [{"type": "text", "text": "1+1"}]}      a content in parts: its texts are joined
{"role": "assistant", "content": null, "tool_calls": [...]}         a call of a tool, which has no text
{"from": "human", "value": "1+1"}                                   ShareGPT: human, gpt, system, tool
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, cast

import msgspec

Message = Mapping[str, Any]  # "role", "content", and whatever else a template reads


class BadChat(ValueError):
    """Messages that can't be rendered; the message says why."""


_ROLES = {  # the names of ShareGPT's turns and of its relatives
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = "function_call"  # ShareGPT's turn that calls a tool: its value is the call as JSON


def is_chat(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value is a list of messages, in any of the forms."""
    if not isinstance(value, list) or not value:
        return False
    items = cast(list[Any], value)
    return all(isinstance(m, dict) and isinstance(m.get("role", m.get("from")), str) for m in items)


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with "role" and "content", whose content is a text, or None beside tool calls. Raises BadChat."""
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def rendered(messages: Sequence[Message], render: Callable[[list[dict[str, Any]]], str]) -> str:
    """The text of a conversation whose messages may have a null content; `render` raises BadChat.

    Some templates test a content for null, others would fail on it or write "None": these get an empty text.
    """
    given = [dict(message) for message in messages]
    if all(message.get("content") is not None for message in given):
        return render(given)
    empty = [{**message, "content": "" if message.get("content") is None else message["content"]} for message in given]
    try:
        text = render(given)
    except BadChat:
        return render(empty)
    return render(empty) if "None" in text and text.count("None") > render(empty).count("None") else text


def _message(message: Message, number: int) -> dict[str, Any]:
    named = str(message.get("role", message.get("from")))
    rest = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
    value = message.get("content", message.get("value"))
    where = f"message {number} ({named})"
    if named == _CALL and "from" in message:
        return {"role": "assistant", "content": None, **rest, "tool_calls": [_call(value, where)]}
    if calls := rest.get("tool_calls"):
        rest["tool_calls"] = [_with_arguments(call) for call in calls]
    if value is None and not calls:
        raise BadChat(f"{where} has no content")
    return {"role": _ROLES.get(named, named), "content": None if value is None else _text(value, where), **rest}


def _text(content: Any, where: str) -> str:
    """A content as one text. Raises BadChat for parts that are no text, e.g. images."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadChat(f"{where}: its content is neither a text nor a list of parts: {content!r:.100}")
    texts: list[str] = []
    for part in cast(list[Any], content):
        match part:
            case str():
                texts.append(part)
            case {"text": str(text)} if part.get("type", "text") == "text":  # type: ignore[union-attr]
                texts.append(text)
            case {"type": kind}:
                raise BadChat(f"{where}: its content has a part of type {kind!r}; only parts of type 'text' are read")
            case _:
                raise BadChat(f"{where}: its content has a part that is no text: {part!r:.100}")
    return "".join(texts)


def _call(value: Any, where: str) -> dict[str, Any]:
    """ShareGPT's {"name": ..., "arguments": ...} as a tool call."""
    try:
        call = msgspec.json.decode(value, type=dict[str, Any]) if isinstance(value, str) else dict(value)
        return _with_arguments({"type": "function", "function": {"name": call["name"], **call}})
    except (msgspec.MsgspecError, TypeError, ValueError, KeyError) as error:
        raise BadChat(f"{where}: want a call as JSON with a name and arguments, got {value!r:.100}") from error


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object, as templates expect; OpenAI writes the object as JSON text."""
    if not isinstance(call, dict):
        return call
    fields = cast(dict[str, Any], call)
    if isinstance(function := fields.get("function"), dict):
        return {**fields, "function": _with_arguments(function)}
    try:
        return {**fields, "arguments": msgspec.json.decode(fields["arguments"], type=dict[str, Any])}
    except (msgspec.MsgspecError, TypeError, KeyError):
        return fields
