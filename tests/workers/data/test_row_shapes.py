"""Rows in the shapes of the Hugging Face Hub become fields; what has another shape is told how to name its columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tiny
from workers.data.datasets import DataError, Demonstration, MissingField, Preference, Problem, read_rows
from workers.data.row_shapes import as_text

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
Read = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(path))
    return path


@pytest.fixture
def read(tmp_path: Path, folder: Path) -> Read:
    """The row of this kind that is read from a file with one row."""

    def one(kind: type, row: dict[str, Any], columns: dict[str, str] | None = None) -> Any:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        return read_rows(tmp_path / "rows.jsonl", kind, columns, folder)[0]

    return one


def test_verls_parquet_is_read_by_dotted_names(tmp_path: Path, folder: Path):
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"content": "1+1=", "role": "user"}],
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "extra_info": {"index": 0, "split": "train"},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    read = read_rows(tmp_path / "x.parquet", Problem, {"reference": "reward_model.ground_truth"}, folder)
    assert read == [Problem("u:1+1=<eos>a:", "2", is_chat=True)]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("a.b", "exact"),  # a column's own name comes first
        ("deep.list.1.value", "second"),
        ("deep.list.-1.value", "third"),
        ("text.answer", "in json"),
        ("deep.flag", "true"),
    ],
)
def test_a_dotted_name_leads_into_objects_lists_and_json(read: Read, name: str, reference: str):
    row = {
        "prompt": "p",
        "a.b": "exact",
        "a": {"b": "nested"},
        "deep": {"list": [{"value": v} for v in ("first", "second", "third")], "flag": True},
        "text": '{"answer": "in json"}',
    }
    assert read(Problem, row, {"reference": name}) == Problem("p", reference)


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (7.0, "7"), (-0.5, "-0.5"), (True, "true"), (False, "false"), (Decimal("7.00"), "7"),
     (Decimal("0.10"), "0.10"), (1e300, str(int(1e300))), (float("inf"), "inf"), (date(2026, 1, 2), "2026-01-02"),
     ("7.0", "7.0")],
)  # fmt: skip
def test_a_number_becomes_its_text(value: Any, text: str):
    assert as_text(value) == text


@pytest.mark.parametrize("reference", [119, 119.0, "119"])
def test_a_reference_may_be_a_number(read: Read, reference: Any):
    assert read(Problem, {"prompt": "A:80+39=", "reference": reference}) == Problem("A:80+39=", "119")


def test_a_response_may_be_a_number(read: Read):
    assert read(Demonstration, {"prompt": "1+1", "label": 2}, {"response": "label"}) == Demonstration("1+1", "2")


def test_contents_in_parts_are_joined(read: Read):
    messages = [{"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]}]
    assert read(Problem, {"messages": messages, "reference": "2"}) == Problem("u:1+1<eos>a:", "2", is_chat=True)


CALLING = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
SHAREGPT = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]


def test_calls_of_tools_have_no_content(read: Read):
    expected = Demonstration('u:1+1<eos>a:[add{"a": 1}]<eos>t:2<eos>a:', "two", is_chat=True)
    assert read(Demonstration, {"messages": CALLING}) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHAREGPT},
        {"conversation": SHAREGPT},
        {"conversations": json.dumps(SHAREGPT)},  # a table of texts
        {"conversations": SHAREGPT, "system": ""},
    ],
)
def test_sharegpt_is_read(read: Read, row: dict[str, Any]):
    assert read(Demonstration, row) == Demonstration("u:1+1<eos>a:", "2", is_chat=True)
    assert read(Problem, row) == Problem("u:1+1<eos>a:", "2", is_chat=True)


def test_sharegpts_system_prompt_may_be_a_column(read: Read):
    assert read(Problem, {"conversations": SHAREGPT, "system": "add"}).prompt == "s:add<eos>u:1+1<eos>a:"
    first = {"from": "system", "value": "sum"}
    assert read(Problem, {"conversations": [first, *SHAREGPT], "system": "add"}).prompt == "s:sum<eos>u:1+1<eos>a:"


def test_a_prompt_may_be_one_message_or_messages_as_json(read: Read):
    message = {"role": "user", "content": "1+1"}
    assert read(Problem, {"prompt": message}) == read(Problem, {"prompt": json.dumps([message])})
    assert read(Problem, {"prompt": message}).prompt == "u:1+1<eos>a:"
    assert read(Problem, {"prompt": '[{"role'}).prompt == '[{"role'


def test_pairs_may_be_sharegpts(read: Read):
    row = {
        "conversations": SHAREGPT[:1],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3"},
    }
    assert read(Preference, row) == Preference("u:1+1<eos>a:", "2", "3", is_chat=True)


@pytest.mark.parametrize(
    ("extra", "prompt"), [({"input": "1 and 1"}, "add\n1 and 1"), ({"input": ""}, "add"), ({}, "add")]
)
def test_alpacas_instruction_and_input_are_the_prompt(read: Read, extra: dict[str, str], prompt: str):
    row = {"instruction": "add", "output": "2", **extra}
    assert read(Demonstration, row) == Demonstration(prompt, "2")
    assert read(Problem, row, {"reference": "output"}) == Problem(prompt, "2")
    assert read(Demonstration, {"response": "3", **row}) == Demonstration(prompt, "3")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"conversations": "1+1"}, "conversations is a text: want a list of messages, or the list as JSON, got '1"),
        ({"prompt": "p", "reference": ["2"]}, "Expected `str`, got `array` - at `\\$.reference`"),
        ({"question": {"text": "1+1", "id": 3}, "answer": "2"}, "no field 'prompt'; the row has 'question.text', "),
    ],
)
def test_what_has_another_shape_is_named(read: Read, row: dict[str, Any], complaint: str):
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{complaint}"):
        read(Problem, row)


def test_a_reference_that_is_nan_is_missing(read: Read):
    with pytest.raises(MissingField, match="no field 'answer'"):
        read(Demonstration, {"prompt": "p", "answer": float("nan")}, {"response": "answer"})
