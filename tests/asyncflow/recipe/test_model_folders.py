"""A folder that a role can't run is refused before anything starts, by its config and its tensors' headers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncflow.recipe.config import BadInput
from asyncflow.recipe.model_folders import check_folder, unusable_folder
from tests import families, tiny

TENSORS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    made = {family: families.make(family, root / family) for family in families.CONFIGS}
    return {**made, "reward": tiny.make_reward(root / "reward")}


@pytest.fixture
def changed(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's folder with other tensors or keys of its config; None removes one."""

    def copy(family: str, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
        folder = Path(shutil.copytree(folders[family], tmp_path / family))
        stored = load_file(folder / TENSORS) | (tensors or {})
        save_file({n: t for n, t in stored.items() if t is not None}, folder / TENSORS)
        own = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(own | config))
        return folder

    return copy


def said(role: str, folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        check_folder(role, str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"models.{role}.path: {folder}: ")
    return message.removeprefix(f"models.{role}.path: {folder}: ")


@pytest.mark.parametrize("family", families.CONFIGS)
@pytest.mark.parametrize("role", ["policy", "reference", "critic"])
def test_every_familys_folder_is_accepted(folders, family: str, role: str):
    check_folder(role, str(folders[family]))


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_language_model_is_no_reward_model(folders, family: str):
    assert said("reward", folders[family]).startswith("it has no score.weight, so it is no reward or cost model: train")


def test_a_reward_model_is_no_policy_but_a_reward_a_cost_and_the_start_of_a_critic(folders):
    assert said("policy", folders["reward"]).startswith("it has score.weight in the place of a token head, so it is a ")
    for role in ("reward", "cost", "critic", "reward.mix.harm"):
        check_folder(role, str(folders["reward"]))


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(changed, folders):
    norm = "model.layers.1.input_layernorm.weight"
    folder = changed("qwen2", {norm: None})
    assert said("policy", folder) == f"it lacks 1 of the model's tensors, first {norm}: download the folder again"
    shutil.rmtree(folder)
    folder = changed("qwen2", hidden_size=128)
    assert said("policy", folder).startswith(
        "model.embed_tokens.weight has shape [47, 64], by its config.json [47, 128]"
    )


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "phi3", "qwen3_moe", "gpt_neox"])
def test_a_layer_or_rows_that_a_family_without_a_plan_lacks_are_named(changed, folders, family: str):
    of_layer = re.compile(r"\b(layers|h)\.1\.")
    folder = changed(family, {n: None for n in load_file(folders[family] / TENSORS) if of_layer.search(n)})
    assert said("policy", folder) == "it lacks all tensors of layer 1 of 2: download the folder again"
    shutil.rmtree(folder)
    assert "has 47 rows, its config.json says vocab_size = 64" in said("policy", changed(family, vocab_size=64))


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj.bias"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
        ("qwen3_moe", "model.layers.1.self_attn.q_norm.weight"),
    ],
)
def test_one_tensor_that_a_family_without_a_plan_lacks_is_named(changed, folders, family: str, tensor: str, role: str):
    words = said(role, changed(family, {tensor: None}))
    assert words == f"it lacks 1 of the model's tensors, first {tensor}: download the folder again"
    assert tensor in load_file(folders[family] / TENSORS)


def test_a_tensor_of_another_shape_of_a_family_without_a_plan_is_told(changed):
    words = said("policy", changed("gpt2", {"transformer.h.1.ln_1.weight": torch.zeros(7)}))
    assert words.startswith("transformers can't load it: ")


def test_training_starts_from_any_language_model_whose_files_are_whole(folders, changed):
    """SFT wants a token head; a reward model's head is new."""
    assert not unusable_folder(str(folders["gemma3"]), "tokens")
    assert not unusable_folder(str(folders["gemma3"]), "value")
    broken = changed("gemma3")
    (broken / TENSORS).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a git-lfs pointer" in unusable_folder(str(broken), "tokens")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2_5_vl", "text_config": {}}, "model_type 'qwen2_5_vl' reads images or sound as well"),
        ({"model_type": "my_model"}, "model_type 'my_model' is no causal language model of transformers 5"),
        ({"model_type": "my_model", "auto_map": {}}, "(its code is in the folder, which is never run): take another"),
        ({"model_type": "bert"}, "model_type 'bert' is not a decoder alone: take a causal language model"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "model_type 'bart' is not a decoder alone"),
        ({"quantization_config": {"bits": 4}}, "has quantised weights (quantization_config), which can't be trained"),
        ({"model_type": "mamba", "state_size": 16}, "has layers with a recurrent state (Mamba, linear attention)"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "has layers with a recurrent state"),
    ],
)
def test_a_model_that_is_not_trained_is_refused_with_what_to_do(changed, config: dict[str, Any], message: str):
    assert message in said("policy", changed("qwen2", **config))
