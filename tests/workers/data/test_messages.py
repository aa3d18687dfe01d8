"""Messages of every form become the form that chat templates read."""

from __future__ import annotations

from typing import Any

import pytest

from workers.data.messages import BadChat, conversation, is_chat, rendered

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("message", "normal"),
    [
        ({"role": "user", "content": "1+1", "name": "a"}, {"role": "user", "content": "1+1", "name": "a"}),
        ({"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]},
         {"role": "user", "content": "1+1"}),
        ({"role": "user", "content": ["1", {"text": "+1"}]}, {"role": "user", "content": "1+1"}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"from": "human", "value": "1+1"}, {"role": "user", "content": "1+1"}),
        ({"from": "gpt", "value": "2"}, {"role": "assistant", "content": "2"}),
        ({"from": "system", "value": "add"}, {"role": "system", "content": "add"}),
        ({"from": "tool", "value": "2"}, {"role": "tool", "content": "2"}),
        ({"from": "observation", "value": "2"}, {"role": "tool", "content": "2"}),
        ({"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
         {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a":1}'}}]},
         {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}),
    ],
)  # fmt: skip
def test_a_message_has_a_role_and_a_text(message: dict[str, Any], normal: dict[str, Any]):
    assert is_chat([message])
    assert conversation([message]) == [normal]


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user"}, r"message 1 \(user\) has no content"),
        ({"role": "user", "content": None}, r"message 1 \(user\) has no content"),
        ({"role": "user", "content": 7}, "neither a text nor a list of parts: 7"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "a part of type 'image_url'; only"),
        ({"role": "user", "content": [{"type": "image", "text": "x"}]}, "a part of type 'image'; only"),
        ({"role": "user", "content": [7]}, "a part that is no text: 7"),
        ({"from": "function_call", "value": "add"}, "want a call as JSON with a name and arguments, got 'add'"),
    ],
)
def test_a_message_that_is_no_text_is_refused(message: dict[str, Any], complaint: str):
    with pytest.raises(BadChat, match=complaint):
        conversation([message])


@pytest.mark.parametrize("value", ["text", [], [1], [{"content": "no role"}], [{"role": 1}], {"role": "user"}, None])
def test_other_values_are_no_conversation(value: Any):
    assert not is_chat(value)


def test_a_null_content_is_rendered_as_the_template_needs_it():
    messages = [{"role": "user", "content": "None?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]

    def writes_it(given: list[dict[str, Any]]) -> str:
        return "".join(f"<{message['content']}>" for message in given)

    def tests_it(given: list[dict[str, Any]]) -> str:
        return "".join("[call]" if message["content"] is None else message["content"] for message in given)

    def fails_on_it(given: list[dict[str, Any]]) -> str:
        if any(message["content"] is None for message in given):
            raise BadChat("can't add None to a text")
        return "".join(message["content"] for message in given)

    assert [rendered(messages, f) for f in (writes_it, tests_it, fails_on_it)] == ["<None?><>", "None?[call]", "None?"]
