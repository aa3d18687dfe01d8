"""Every step reads a folder's tokenizer.json alike: nothing in it is rebuilt, padded or cut, and BOS comes once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests import tiny, tiny_tokenizers
from tests.tiny_tokenizers import BOS, BOS_ID
from workers.data.tokenizer import BadTokenizer, Tokenizer

TEXT = "we need to add 9 and 6"


def ids(rows: list[Any]) -> list[list[int]]:
    return [row.tolist() for row in rows]


def test_a_tokenizer_is_read_and_not_rebuilt_by_its_class(tmp_path: Path):
    """transformers rebuilds this one as a Llama-2 tokenizer, which loses the spaces."""
    folder = tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path, tokenizer_class="LlamaTokenizerFast")
    tokenizer = Tokenizer(folder)
    (encoded,) = tokenizer.encode([TEXT])
    assert encoded.tolist() == tiny_tokenizers.byte_level().encode(TEXT).ids
    assert tokenizer.decode([encoded]) == [TEXT]
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert rebuilt.decode(rebuilt.encode(TEXT, add_special_tokens=False)) != TEXT


def test_stored_padding_and_truncation_are_off(tmp_path: Path):
    made = tiny_tokenizers.characters()
    made.enable_padding(length=24, pad_id=tiny.PAD_ID, pad_token=tiny.PAD)
    made.enable_truncation(max_length=5)
    tokenizer = Tokenizer(tiny_tokenizers.save(made, tmp_path))
    assert ids(tokenizer.encode(["12+34=46", "1"])) == [tiny.encode("12+34=46").tolist(), tiny.encode("1").tolist()]
    assert ids(tokenizer.prompts(["1"], [False])) == [tiny.encode("1").tolist()]


@pytest.mark.parametrize(
    ("written", "config", "starts"),
    [
        (True, {}, True),
        (True, {"add_bos_token": True}, True),
        (True, {"add_bos_token": False}, True),  # transformers reads the file
        (False, {}, False),
        (False, {"add_bos_token": True}, True),
        (False, {"add_bos_token": True, "bos_token": {"content": BOS}}, True),
        (False, {"add_bos_token": True, "bos_token": None}, False),
    ],
)
def test_a_plain_prompt_begins_with_bos_where_the_tokenizer_says_so(
    tmp_path: Path, written: bool, config: dict[str, Any], starts: bool
):
    made = tiny_tokenizers.with_bos(at_start=written)
    folder = tiny_tokenizers.save(made, tmp_path, **{"bos_token": BOS, **config})
    tokenizer, bos = Tokenizer(folder), [BOS_ID] if starts else []
    assert tokenizer.start == tuple(bos)
    (plain,) = tokenizer.prompts(["1+1="], [False])
    assert plain.tolist() == [*bos, *tiny.encode("1+1=").tolist()]
    if written or not starts:  # transformers reads no add_bos_token beside a tokenizer.json
        assert plain.tolist() == AutoTokenizer.from_pretrained(folder)("1+1=")["input_ids"]


def test_bos_comes_once_and_a_chat_has_what_its_template_wrote(tmp_path: Path):
    tokenizer = Tokenizer(tiny_tokenizers.save(tiny_tokenizers.with_bos(), tmp_path, bos_token=BOS))
    written, silent = [BOS_ID, *tiny.encode("1").tolist()], tiny.encode("1").tolist()
    assert ids(tokenizer.prompts([f"{BOS}1", "1"], [False, False])) == [written, written]
    assert ids(tokenizer.prompts([f"{BOS}1", "1", ""], [True, True, False])) == [written, silent, []]


@pytest.mark.parametrize("processor", ["BertProcessing", "RobertaProcessing"])
def test_other_post_processors_write_a_start_too(tmp_path: Path, processor: str):
    made = tiny_tokenizers.characters(BOS)
    made.post_processor = getattr(tiny_tokenizers.processors, processor)((tiny.EOS, tiny.EOS_ID), (BOS, BOS_ID))
    assert Tokenizer(tiny_tokenizers.save(made, tmp_path)).start == (BOS_ID,)


def test_a_text_goes_on_from_its_prompt(tmp_path: Path):
    """Alone, "and" would get the space that this tokenizer puts before a text."""
    tokenizer = Tokenizer(tiny_tokenizers.save(tiny_tokenizers.metaspace(), tmp_path))
    prompt, rest = "we need to add 9", " and 6"
    (asked,), (added,), (whole,) = (
        tokenizer.encode([prompt]),
        tokenizer.continuations([prompt], tokenizer.encode([prompt]), [rest]),
        tokenizer.encode([prompt + rest]),
    )
    assert [*asked, *added] == whole.tolist()
    assert tokenizer.decode([whole]) == [prompt + rest]


def test_a_prompt_keeps_its_ids_where_a_token_would_reach_over_its_end(tmp_path: Path):
    tokenizer = Tokenizer(tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path))
    prompts, texts = ["we ", "we"], ["need", " need"]
    over, not_over = tokenizer.continuations(prompts, tokenizer.encode(prompts), texts)
    assert over.tolist() == tokenizer.encode(["need"])[0].tolist()
    assert not_over.tolist() == [tokenizer.id_of("Ġneed")]


def test_many_texts_are_more_than_one_call(tmp_path: Path):
    tokenizer = Tokenizer(tiny_tokenizers.save(tiny_tokenizers.characters(), tmp_path))
    texts = [str(i) for i in range(20_000)]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


def test_special_tokens_are_text_on_request(tmp_path: Path):
    tokenizer = Tokenizer(tiny_tokenizers.save(tiny_tokenizers.characters(), tmp_path))
    row = [*tiny.encode("12"), tiny.EOS_ID]
    assert (tokenizer.decode([row]), tokenizer.decode([row], special=True)) == (["12"], ["12<eos>"])


def test_what_can_t_be_read_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(BadTokenizer, match=r"has no tokenizer\.json.*AutoTokenizer\.from_pretrained"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadTokenizer, match=r"tokenizer\.json can't be read"):
        Tokenizer(tmp_path)
