"""Which tokens end a response, by the files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from workers.data.hf_folder import end_tokens_of, eos_token_of


def folder_of(path: Path, **files: dict[str, Any]) -> Path:
    """A folder of the tiny tokenizer, whose eos token has id 1, with the given JSON files."""
    tiny.tokenizer().save_pretrained(str(path))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {1}),
        ({"generation_config": {"eos_token_id": 5}}, {1, 5}),
        ({"generation_config": {"eos_token_id": [9, 1, 7]}}, {1, 7, 9}),  # as Llama-3 and Gemma have it
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": [3, 4]}}, {1, 3, 4}),
        ({"generation_config": {"eos_token_id": 5}, "config": {"eos_token_id": 6}}, {1, 5, 6}),
        ({"config": {"text_config": {"eos_token_id": 8}}}, {1, 8}),
        ({"config": {"eos_token_id": 6}, "tokenizer_config": {"eos_token": {"content": "<eos>"}}}, {1, 6}),
        ({"config": {"eos_token_id": 6}, "tokenizer_config": {}}, {6}),
        ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "<eos>"}}, {1}),
    ],
)
def test_every_end_token_of_model_and_tokenizer_counts(tmp_path: Path, files: dict[str, Any], ends: set[int]):
    assert end_tokens_of(folder_of(tmp_path, **files)) == ends


def test_a_text_ends_with_the_eos_token_of_its_tokenizer(tmp_path: Path):
    assert eos_token_of(folder_of(tmp_path, generation_config={"eos_token_id": [9, 1]})) == 1
    assert eos_token_of(folder_of(tmp_path, generation_config={"eos_token_id": [9, 4]}, tokenizer_config={})) == 9


def test_an_eos_token_may_stand_in_the_vocabulary_alone(tmp_path: Path):
    folder = folder_of(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": []}))
    assert eos_token_of(folder) == 1


def test_files_that_are_no_json_are_named(tmp_path: Path):
    folder = folder_of(tmp_path)
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        end_tokens_of(folder)


def test_a_folder_that_names_no_end_token_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path, config={}, tokenizer_config={})
    for read in (end_tokens_of, eos_token_of):
        with pytest.raises(ValueError, match=r"no eos_token_id .* name the tokens that end a response"):
            read(folder)
