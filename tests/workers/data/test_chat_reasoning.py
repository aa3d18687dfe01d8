"""Templates of reasoning models open a reply in the prompt, or write an answer without its reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_tokenizers
from workers.data.datasets import DataError, Demonstration, Preference, Problem, read_rows

# DeepSeek-R1's: the prompt opens the reasoning, and no answer keeps its own.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% else %}"
    "[A]{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
# Qwen3's: the last answer keeps its reasoning, earlier ones don't.
QWEN = (
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% else %}[A]"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)
# One that drops all reasoning and opens none.
SILENT = R1.replace("[A]<think>\n", "[A]")
USER = {"role": "user", "content": "1+1"}


def answer(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def read(tmp_path: Path, template: str, kind: type, **row: Any) -> Any:
    folder = tiny_tokenizers.save(tiny_tokenizers.characters(), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    return read_rows(path, kind, tokenizer=folder)[0]


def test_a_prompt_of_rl_has_the_opening(tmp_path: Path):
    assert read(tmp_path, R1, Problem, prompt=[USER]).prompt == "[U]1+1[A]<think>\n"
    earlier = [USER, answer("<think>hm</think>2"), {"role": "user", "content": "sure?"}]
    assert read(tmp_path, R1, Problem, prompt=earlier).prompt == "[U]1+1[A]2<eos>[U]sure?[A]<think>\n"


@pytest.mark.parametrize(
    ("template", "content", "prompt", "response"),
    [
        (R1, "<think>\nhm</think>2", "[U]1+1[A]<think>\n", "hm</think>2"),  # the answer repeats the opening
        (R1, "<think>hm</think>2", "[U]1+1[A]<think>\n", "hm</think>2"),
        (R1, "hm</think>2", "[U]1+1[A]<think>\n", "hm</think>2"),  # it leaves the opening out
        (R1, "2", "[U]1+1[A]", "2"),  # it has no reasoning: the prompt does not open any
        (R1, "<b>2</b>", "[U]1+1[A]", "<b>2</b>"),  # the opening's "<" is none of the prompt
        (QWEN, "<think>hm</think>2", "[U]1+1[A]", "<think>hm</think>2"),
        (SILENT, "<think>hm</think>2", "[U]1+1[A]", "<think>hm</think>2"),  # what the template drops is learned
    ],
)
def test_a_demonstration_keeps_its_reasoning(tmp_path: Path, template: str, content: str, prompt: str, response: str):
    row = read(tmp_path, template, Demonstration, messages=[USER, answer(content)])
    assert row == Demonstration(prompt, response, is_chat=True)


def test_a_pair_has_one_prompt(tmp_path: Path):
    row = read(tmp_path, R1, Preference, prompt=[USER], chosen=[answer("hm</think>2")], rejected=[answer("3")])
    assert row == Preference("[U]1+1[A]", "<think>\nhm</think>2", "3", is_chat=True)


def test_an_answer_of_several_messages_whose_last_one_is_cut_is_refused(tmp_path: Path):
    turns = [answer("<think>a</think>1"), USER, answer("<think>b</think>2")]
    with pytest.raises(DataError, match="drops a part of the last of 3 messages"):
        read(tmp_path, SILENT, Demonstration, prompt=[USER], completion=turns)
