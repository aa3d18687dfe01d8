"""A folder's headers say what is in it; each way in which a download fails is named, with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests import tiny
from workers.data.folder_tensors import INDEX, ONE_FILE, BadFolder, StoredTensor, stored_tensors
from workers.training.models import load_causal

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 536870912\n"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def sharded(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    load_causal(policy).save_pretrained(str(folder), max_shard_size="200KB")
    return folder


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copied"))


def said(folder: Path) -> str:
    with pytest.raises(BadFolder) as caught:
        stored_tensors(folder)
    return str(caught.value)


def test_names_shapes_and_dtypes_are_the_files(policy: Path, sharded: Path):
    with safe_open(policy / ONE_FILE, "pt") as file:
        expected = {name: StoredTensor("F32", tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    assert stored_tensors(policy) == stored_tensors(sharded) == expected


@pytest.mark.parametrize("file", ["model-00001-of-", "config.json"])
def test_a_pointer_of_git_lfs_is_named(copied: Path, file: str):
    (path,) = copied.glob(f"{file}*")
    path.write_text(POINTER)
    message = said(copied)
    assert message.startswith(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in ")


def test_a_missing_file_of_the_index_is_named(copied: Path):
    path = sorted(copied.glob("*.safetensors"))[1]
    path.unlink()
    assert f"lacks 1 of the {1 + len(list(copied.glob('*.safetensors')))} files that {INDEX} lists" in said(copied)
    assert path.name in said(copied)


def test_a_tensor_that_only_the_index_has_is_named(copied: Path):
    index = json.loads((copied / INDEX).read_text())
    index["weight_map"]["model.more.weight"] = min(index["weight_map"].values())
    (copied / INDEX).write_text(json.dumps(index))
    assert f"lacks 1 tensors that {INDEX} promises, first model.more.weight" in said(copied)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_file_that_ends_too_early_is_named(policy: Path, tmp_path: Path, keep: int):
    whole = (policy / ONE_FILE).read_bytes()
    (tmp_path / ONE_FILE).write_bytes(whole[:keep])
    message = said(tmp_path)
    assert message.startswith(str(tmp_path / ONE_FILE))
    assert "download it again" in message
    assert (f"truncated: {len(whole) - 1} bytes of {len(whole)}" in message) == (keep == -1)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "{"])
def test_an_index_that_is_none_is_named(copied: Path, text: str):
    (copied / INDEX).write_text(text)
    assert f"{INDEX} is no index of tensors" in said(copied)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "has its weights as pytorch_model.bin, only safetensors files are read: convert them"),
        ("model.Q4.gguf", "has its weights as model.Q4.gguf"),
        ("adapter_config.json", "has adapters and not the model that they belong to: merge them"),
        ("other.safetensors", "has other.safetensors, but neither"),
        ("README.md", "has no *.safetensors weights: its download is not complete"),
    ],
)
def test_a_folder_without_readable_weights_says_what_to_do(tmp_path: Path, file: str, message: str):
    (tmp_path / file).write_text("{}")
    assert message in said(tmp_path)
