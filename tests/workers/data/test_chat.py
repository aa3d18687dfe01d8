"""Conversations are rendered with the tokenizer's chat template and split where the reply begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests import tiny
from workers.data.datasets import DataError, Demonstration, Preference, Problem, read_rows
from workers.data.token_rows import Text, tokenized
from workers.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>.{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
USER, MORE = {"role": "user", "content": "1+1"}, {"role": "user", "content": "sure?"}
GOOD, BAD = {"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3"}
PROMPT = "u:1+1<eos>.a:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(path))
    return path


def one(tmp_path: Path, folder: Path, kind: type, **row: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    return read_rows(path, kind, tokenizer=folder)[0]


def test_a_prompt_ends_where_the_reply_begins(tmp_path: Path, folder: Path):
    assert one(tmp_path, folder, Problem, prompt=[USER]) == Problem(PROMPT, is_chat=True)
    assert one(tmp_path, folder, Problem, messages=[USER], reference="2") == Problem(PROMPT, "2", is_chat=True)
    assert one(tmp_path, folder, Problem, messages=[USER, GOOD], reference="4") == Problem(PROMPT, "4", is_chat=True)
    assert one(tmp_path, folder, Problem, messages=[USER, GOOD, MORE]).prompt == "u:1+1<eos>.a:2<eos>.u:sure?<eos>.a:"


def test_the_answer_that_a_conversation_ends_with_is_the_reference_of_a_row_without_one(tmp_path: Path, folder: Path):
    assert one(tmp_path, folder, Problem, messages=[USER, GOOD]) == Problem(PROMPT, "2", is_chat=True)
    assert one(tmp_path, folder, Problem, messages=[USER]) == Problem(PROMPT, "", is_chat=True)


def test_text_stays_as_it_is(tmp_path: Path, folder: Path):
    assert one(tmp_path, folder, Problem, prompt="1+1", messages=[MORE]) == Problem("1+1")
    assert one(tmp_path, folder, Demonstration, prompt="1+1=", completion="2") == Demonstration("1+1=", "2")
    assert one(tmp_path, folder, Demonstration, text="1+1=2") == Demonstration("", "1+1=2")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD]},
        {"prompt": "1+1", "messages": [USER, GOOD]},  # the row repeats the question
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": [USER], "response": "2"},
        {"prompt": "1+1", "response": [GOOD]},
    ],
)
def test_a_demonstration_is_the_last_reply(tmp_path: Path, folder: Path, row: dict[str, Any]):
    assert one(tmp_path, folder, Demonstration, **row) == Demonstration(PROMPT, "2", is_chat=True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "1+1", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "1+1", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the row repeats the question
        {"prompt": [USER], "chosen": "2", "rejected": "3"},
    ],
)
def test_a_pair_shares_its_prompt(tmp_path: Path, folder: Path, row: dict[str, Any]):
    assert one(tmp_path, folder, Preference, **row) == Preference(PROMPT, "2", "3", is_chat=True)


def test_a_pair_of_texts_without_a_prompt_is_cut_between_words(tmp_path: Path, folder: Path):
    row = one(tmp_path, folder, Preference, chosen="q: 1+1 a: two", rejected="q: 1+1 a: three")
    assert row == Preference("q: 1+1 a:", " two", " three")


def test_prompt_and_response_are_the_tokens_of_the_whole_conversation(tmp_path: Path, folder: Path):
    row = one(tmp_path, folder, Demonstration, messages=[USER, GOOD])
    texts = tokenized(Tokenizer(folder), [Text(row.prompt, row.response, is_chat=row.is_chat)])
    whole = AutoTokenizer.from_pretrained(folder).apply_chat_template([USER, GOOD], return_dict=False)
    assert [*texts.prompts[0].tolist(), *texts.responses[0].tolist()] == whole[:-1]  # all but the dot after the end


def test_a_text_follows_its_own_first_token(folder: Path):
    texts = tokenized(Tokenizer(folder), [Text("", "12"), Text("1", "2")])
    assert [texts.prompts[0].tolist(), texts.prompts[1].tolist()] == [tiny.encode("1").tolist()] * 2
    assert [texts.responses[0].tolist(), texts.responses[1].tolist()] == [[*tiny.encode("2"), tiny.EOS_ID]] * 2


@pytest.mark.parametrize(
    ("kind", "row", "complaint"),
    [
        (Demonstration, {"messages": [USER]}, "has no message before the reply"),
        (Demonstration, {"messages": [USER, GOOD, MORE]}, "does not end with a message of the assistant"),
        (
            Problem,
            {"messages": [{"speaker": "human", "text": "1+1"}]},
            "the prompt is a list: want chat messages, each with a role",
        ),
        (
            Demonstration,
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"message 2 \(assistant\) has no content",
        ),
        (Preference, {"prompt": "1", "chosen": [], "rejected": [BAD]}, "the chosen is a list: want chat messages"),
        (
            Problem,
            {"question": "1+1"},
            "no field 'prompt'; the row has 'question'; want prompt, messages or conversations and",
        ),
        (Demonstration, {"prompt": "1"}, "want prompt [+] response, prompt [+] completion, messages, conversations"),
        (Preference, {"prompt": "1", "chosen": "2"}, "no field 'rejected'.*want prompt [+] chosen [+] rejected"),
    ],
)
def test_what_is_no_row_is_named_by_place(
    tmp_path: Path, folder: Path, kind: type, row: dict[str, Any], complaint: str
):
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{complaint}"):
        one(tmp_path, folder, kind, **row)


def test_a_tokenizer_without_a_template_renders_no_conversation(tmp_path: Path):
    tiny.tokenizer().save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row is a conversation .*plain has no chat template"):
        one(tmp_path, tmp_path / "plain", Problem, messages=[USER])


def test_a_template_that_rewrites_answered_turns_is_refused(tmp_path: Path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(str(tmp_path / "odd"))
    with pytest.raises(DataError, match=r"writes a conversation differently once it is answered: '21\+1'"):
        one(tmp_path, tmp_path / "odd", Demonstration, messages=[USER, GOOD])
