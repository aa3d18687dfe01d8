"""Two tokenizers are equal if they do the same; otherwise the first difference is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from tests import tiny, tiny_tokenizers
from tests.tiny_tokenizers import BOS
from workers.data.tokenizer_difference import difference

Change = Callable[[dict[str, Any]], object]


def compared(tmp_path: Path, change: Change, made: Any = None, **config: Any) -> str:
    """The difference of a tokenizer and one whose file was changed."""
    one = tiny_tokenizers.save(made or tiny_tokenizers.byte_level(), tmp_path / "one")
    other = tiny_tokenizers.save(made or tiny_tokenizers.byte_level(), tmp_path / "other", **config)
    content = json.loads((other / "tokenizer.json").read_text())
    change(content)
    (other / "tokenizer.json").write_text(json.dumps(content))
    return difference(one, other)


def merges_as_text(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]


def with_padding(content: dict[str, Any]) -> None:
    strategy = {"strategy": {"Fixed": 24}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = strategy | {"pad_id": 0, "pad_type_id": 0, "pad_token": tiny.PAD}


def in_a_sequence(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,  # white space differs
        merges_as_text,
        with_padding,
        in_a_sequence,
        lambda content: content["pre_tokenizer"].update(trim_offsets=False),
        lambda content: content["decoder"].update(add_prefix_space=False),
        lambda content: content["model"].update(unk_token=None, continuing_subword_prefix=""),
        lambda content: content["model"].update(vocab=dict(reversed(content["model"]["vocab"].items()))),
    ],
)
def test_what_changes_no_id_does_not_count(tmp_path: Path, change: Change):
    assert compared(tmp_path, change) == ""


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap, r"the token 'a' has id (\d+) in \S+one and \d+ in \S+other"),
        (lambda content: content["model"]["merges"].pop(), r"their models differ: merges: \['Ġan', 'd'\] and None"),
        (lambda content: content["model"]["vocab"].update(new=999), "'new' has id 999 in .*other and none in .*one"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "'é .* has the ids"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "'Hello, world! .* has the ids"),
        (lambda content: content["added_tokens"][1].update(lstrip=True), "'1 <eos> 1' has the ids"),
    ],
)
def test_what_changes_ids_is_named(tmp_path: Path, change: Change, named: str):
    assert re.search(named, compared(tmp_path, change))


def test_rules_that_no_text_of_the_vocabulary_meets_do_not_count(tmp_path: Path):
    """Characters have no merges: however a text is split, and whatever becomes of letters that have no id."""
    made = tiny_tokenizers.characters()
    one, other = tiny_tokenizers.save(made, tmp_path / "one"), tmp_path / "other"
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[0-9]|[a-z]"), "isolated"), made.pre_tokenizer]
    )
    assert difference(one, tiny_tokenizers.save(made, other)) == ""
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "has the ids" in difference(one, tiny_tokenizers.save(made, other))


def test_a_start_counts(tmp_path: Path):
    said = compared(tmp_path, lambda content: content.update(post_processor=None), tiny_tokenizers.with_bos())
    assert said.startswith("a text begins with ['<bos>'] in ")
    asked_for = {"add_bos_token": True, "bos_token": BOS}
    silent = tiny_tokenizers.with_bos(at_start=False)
    said = compared(tmp_path, lambda content: None, silent, **asked_for)
    assert said.endswith("other")
    assert said.startswith("a text begins with [] in ")


def test_the_other_may_have_special_tokens_of_its_own_above_all_ids(tmp_path: Path):
    """A reward model often has a padding token that its policy lacks."""
    policy = tiny_tokenizers.save(tiny_tokenizers.characters(), tmp_path / "policy")
    reward = tiny_tokenizers.save(tiny_tokenizers.characters("[PAD]"), tmp_path / "reward")
    assert difference(policy, reward) == ""
    assert "'[PAD]' has id" in difference(reward, policy)
