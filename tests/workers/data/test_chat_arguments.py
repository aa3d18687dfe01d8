"""What a chat template is given beside the messages: a system message, arguments, a row's tools, special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_tokenizers
from workers.data.datasets import DataError, Demonstration, Problem, read_rows
from workers.data.tokenizer import Tokenizer
from workers.settings import Chat

USER, ANSWER = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "be brief"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% if enable_thinking is defined and not enable_thinking %}-{% endif %}{% endif %}"
)


def read(
    tmp_path: Path,
    row: dict[str, Any],
    kind: type = Problem,
    chat: Chat = Chat(),  # noqa: B008 - frozen
    files: Mapping[str, str] = {"chat_template.jinja": TEMPLATE},
) -> Any:
    folder = tiny_tokenizers.save(tiny_tokenizers.with_bos(), tmp_path / "model", bos_token=tiny_tokenizers.BOS)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    return read_rows(path, kind, tokenizer=folder, chat=chat)[0]


def test_a_conversation_without_a_system_message_gets_the_one_of_the_settings(tmp_path: Path):
    chat = Chat(system="be brief")
    assert read(tmp_path, {"prompt": [USER]}, chat=chat).prompt == "s:be brief<eos>u:1+1<eos>a:"
    own = [{"role": "system", "content": "be kind"}, USER]
    assert read(tmp_path, {"prompt": own}, chat=chat).prompt == "s:be kind<eos>u:1+1<eos>a:"
    row = {"messages": [USER, ANSWER]}
    assert read(tmp_path, row, Demonstration, chat).prompt == "s:be brief<eos>u:1+1<eos>a:"


def test_a_text_becomes_the_message_of_a_user_on_request(tmp_path: Path):
    assert read(tmp_path, {"prompt": "1+1"}) == Problem("1+1")
    chat = Chat(from_text=True, system="be brief")
    assert read(tmp_path, {"prompt": "1+1"}, chat=chat) == Problem("s:be brief<eos>u:1+1<eos>a:", is_chat=True)
    row = {"prompt": "1+1", "response": "2"}
    expected = Demonstration("u:1+1<eos>a:", "2", is_chat=True)
    assert read(tmp_path, row, Demonstration, Chat(from_text=True)) == expected
    assert read(tmp_path, {"text": "1+1"}, Demonstration, chat) == Demonstration("", "1+1")  # it has no prompt


def test_a_system_message_for_a_text_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the prompt is a text, .* want chat\.from_text = true"):
        read(tmp_path, {"prompt": "1+1"}, chat=Chat(system="be brief"))


def test_arguments_reach_the_template_and_a_row_may_have_its_own(tmp_path: Path):
    chat = Chat(arguments={"enable_thinking": False})
    assert read(tmp_path, {"prompt": [USER]}, chat=chat).prompt == "u:1+1<eos>a:-"
    row = {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": True}}
    assert read(tmp_path, row, chat=chat).prompt == "u:1+1<eos>a:"


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD])])
def test_the_tools_of_a_row_are_written(tmp_path: Path, tools: Any):
    assert read(tmp_path, {"prompt": [USER], "tools": tools}).prompt == "[add]u:1+1<eos>a:"
    row = {"prompt": [USER], "functions": tools}
    assert read(tmp_path, row, chat=Chat(tools="functions")).prompt == "[add]u:1+1<eos>a:"


def test_tools_that_the_template_would_drop_are_refused(tmp_path: Path):
    row, plain = {"prompt": [USER], "tools": [ADD]}, {"chat_template.jinja": "{{ messages[-1].content }}"}
    with pytest.raises(DataError, match=r"the row has 'tools', and .* writes no tools: .* chat\.tools = ''"):
        read(tmp_path, row, files=plain)
    assert read(tmp_path, row, chat=Chat(tools=""), files=plain).prompt == "1+1"
    with pytest.raises(DataError, match="tools: want a list of tools, each with its name and parameters, got"):
        read(tmp_path, {"prompt": [USER], "tools": {"add": {}}})


def test_calls_that_the_template_leaves_out_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Data with calls of tools are used with a plain template on purpose, too."""
    called = [USER, {"role": "assistant", "content": None, "tool_calls": [ADD]}, {"role": "tool", "content": "2"}]
    plain = {"chat_template.jinja": "{% for m in messages %}{{ m.content }}.{% endfor %}"}
    assert read(tmp_path, {"prompt": called}, files=plain).prompt == "1+1..2."
    (warning,) = caplog.messages
    assert "does not write tool calls: that of 'add', and all others, are left out of the text" in warning


def test_a_template_may_write_bos_and_plain_text_gets_no_second(tmp_path: Path):
    template = {"chat_template.jinja": "{{ bos_token }}{{ messages[-1].content }}{{ pad_token }}"}
    row = read(tmp_path, {"prompt": [USER]}, files=template)
    assert row.prompt == "<bos>1+1<pad>"
    (tokens,) = Tokenizer(tmp_path / "model").prompts([row.prompt], [row.is_chat])
    assert tokens.tolist().count(tiny_tokenizers.BOS_ID) == 1


def test_templates_stand_in_any_of_the_files_that_transformers_reads(tmp_path: Path):
    named = json.dumps({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]})
    for number, files in enumerate(
        [
            {"tokenizer_config.json": json.dumps({"chat_template": "d"})},
            {"tokenizer_config.json": named},
            {"chat_template.json": json.dumps({"chat_template": "d"})},
            {"tokenizer_config.json": json.dumps({"chat_template": "old"}), "chat_template.jinja": "d"},
        ]
    ):
        assert read(tmp_path / str(number), {"prompt": [USER]}, files=files).prompt == "d", files


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / str(number)).mkdir()


def test_tools_choose_the_template_for_them(tmp_path: Path):
    files = {"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "{{ tools[0].function.name }}"}
    assert read(tmp_path, {"prompt": [USER], "tools": [ADD]}, files=files).prompt == "add"
    assert read(tmp_path, {"prompt": [USER]}, files=files).prompt == "d"


def test_an_argument_that_every_conversation_has_is_refused():
    with pytest.raises(ValueError, match=r"arguments\.messages: every row's conversation has its own"):
        Chat(arguments={"messages": "x"})
