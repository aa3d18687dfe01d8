"""Texts become rows of tokens: where BOS stands, which token ends a response, and what the model has no row for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny, tiny_tokenizers
from tests.tiny_tokenizers import BOS, BOS_ID
from workers.data.dataset_files import DataError
from workers.data.token_rows import Text, end_of_turns, tokenized
from workers.data.tokenizer import Tokenizer

TURN, TURN_ID = "<turn>", BOS_ID + 1
TEMPLATE = "{% for m in messages %}{{ m.content }}" + TURN + "\n{% endfor %}"


def ids(text: str) -> list[int]:
    return tiny.encode(text).tolist()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Its template ends a turn with another token than a text, as Llama-3's does."""
    made = tiny_tokenizers.with_bos()
    made.add_special_tokens([TURN])
    folder = tiny_tokenizers.save(made, tmp_path, bos_token=BOS, chat_template=TEMPLATE)
    return Tokenizer(folder)


def test_a_plain_prompt_begins_with_bos_and_its_response_ends_with_eos(tokenizer: Tokenizer):
    rows = tokenized(tokenizer, [Text("1+1=", "2"), Text(f"{BOS}1+1=", "2"), Text("1+1=", "2", truncated=True)])
    assert [row.tolist() for row in rows.prompts] == [[BOS_ID, *ids("1+1=")]] * 3
    assert [row.tolist() for row in rows.responses] == [[*ids("2"), tiny.EOS_ID]] * 2 + [ids("2")]


def test_a_chat_has_what_its_template_wrote_and_ends_its_turn(tokenizer: Tokenizer):
    rows = tokenized(tokenizer, [Text("u:1", "2", is_chat=True), Text(f"{BOS}u:1", "2", is_chat=True)])
    assert [row.tolist() for row in rows.prompts] == [ids("u:1"), [BOS_ID, *ids("u:1")]]
    assert [row.tolist() for row in rows.responses] == [[*ids("2"), TURN_ID]] * 2


def test_a_text_without_a_prompt_follows_bos(tokenizer: Tokenizer):
    rows = tokenized(tokenizer, [Text("", "12"), Text("", f"{BOS}12")])
    assert [row.tolist() for row in rows.prompts] == [[BOS_ID]] * 2
    assert [row.tolist() for row in rows.responses] == [[*ids("12"), tiny.EOS_ID]] * 2


@pytest.mark.parametrize("template", ["{{ messages[-1].content }}\n", "{{ raise_exception('no') }}", None])
def test_turns_end_with_eos_where_the_template_names_no_token(tmp_path: Path, template: str | None):
    folder = tiny_tokenizers.save(tiny_tokenizers.with_bos(), tmp_path, chat_template=template)
    assert end_of_turns(Tokenizer(folder)) == tiny.EOS_ID


def test_a_token_that_the_model_has_no_row_for_is_refused_with_its_row(tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": BOS_ID + 1}))
    (tmp_path / "rows.jsonl").write_text("{}\n\n{}\n")
    said = rf"rows\.jsonl:3: the token '<turn>' has id {TURN_ID}, .* has {BOS_ID + 1} rows of vocabulary"
    with pytest.raises(DataError, match=said):
        tokenized(tokenizer, [Text("1", "2"), Text("1", "2", is_chat=True)], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=said):
        rows = [Text("1", "2"), Text("1", "2"), Text("1", "2"), Text("1", TURN)]
        tokenized(tokenizer, rows, tmp_path / "rows.jsonl", per_row=2)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": TURN_ID + 1}}))
    assert len(tokenized(tokenizer, [Text("1", TURN)], tmp_path / "rows.jsonl")) == 1
