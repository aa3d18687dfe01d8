"""A rank reads its slices from a transformers folder, whichever files hold them, and missing tensors are an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2ForCausalLM

from tests import tiny
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Decoder, Head, ShardPlan
from workers.parallel.shard_reader import read_shard
from workers.training.models import load_causal, load_critic, load_reward


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = tiny.config()
    config.vocab_size = 48  # divisible by two ranks
    folder = tmp_path_factory.mktemp("policy")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_reward(tmp_path_factory.mktemp("reward"))


def plan_of(folder: Path, pp: int = 1, tp: int = 1, head: Head = "tokens") -> ShardPlan:
    return ShardPlan(Decoder.of(AutoConfig.from_pretrained(folder).to_dict(), head), pp, tp)


def whole(folder: Path, plan: ShardPlan) -> dict[str, torch.Tensor]:
    """The shards of all ranks, assembled."""
    tensors: dict[str, torch.Tensor] = {}
    for stage in range(plan.pp):
        shards = [read_shard(folder, plan, stage, t) for t in range(plan.tp)]
        for p in plan.parameters(stage):
            parts = [shard[p.name] for shard in shards]
            tensors[p.name] = parts[0] if p.cut is None else torch.cat(parts, p.cut)
    return tensors


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_all_places_together_hold_the_checkpoint(policy: Path, pp: int, tp: int):
    ours = whole(policy, plan_of(policy, pp, tp))
    theirs = dict(load_causal(policy).named_parameters())
    head = ours.pop(TOKEN_HEAD, ours[EMBEDDING])  # tied: a stage that needs the head reads the embedding
    assert torch.equal(head, theirs[EMBEDDING])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_in_many_files_reads_alike(policy: Path, tmp_path: Path):
    load_causal(policy).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    plan = plan_of(policy, 1, 2)
    ours, theirs = read_shard(tmp_path, plan, 0, 1), read_shard(policy, plan, 0, 1)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_come_in_the_type_that_is_asked_for(policy: Path):
    shard = read_shard(policy, plan_of(policy), 0, 0, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in shard.values()} == {torch.bfloat16}


def test_a_policys_folder_gives_a_critic_a_zero_head(policy: Path):
    shard = read_shard(policy, plan_of(policy, head="value"), 0, 0)
    assert not shard["score.weight"].any()
    assert not shard["score.bias"].any()


def test_a_reward_models_head_is_kept(reward: Path):
    weight = load_reward(reward).get_parameter("score.weight")
    assert torch.equal(read_shard(reward, plan_of(reward, head="score"), 0, 0)["score.weight"], weight)
    critic = read_shard(reward, plan_of(reward, head="value"), 0, 0)
    assert torch.equal(critic["score.weight"], load_critic(reward).get_parameter("score.weight"))
    assert not critic["score.bias"].any()


def test_missing_tensors_are_refused_by_name(policy: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: \['score.weight'\]"):
        read_shard(policy, plan_of(policy, head="score"), 0, 0)
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        read_shard(tmp_path, plan_of(policy), 0, 0)


def test_a_tensor_of_another_shape_than_the_configs_is_refused(policy: Path, tmp_path: Path):
    tensors = load_file(policy / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(7,\), the config's is \(128,\)"):
        read_shard(tmp_path, plan_of(policy), 0, 0)


def test_an_index_names_the_file_of_each_tensor(policy: Path, tmp_path: Path):
    """Only the named files are opened; others in the folder are ignored."""
    save_file(load_file(policy / "model.safetensors"), tmp_path / "weights.safetensors")
    (tmp_path / "model.safetensors").write_text("not a checkpoint")
    names = dict.fromkeys(load_file(policy / "model.safetensors"), "weights.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert read_shard(tmp_path, plan_of(policy), 0, 0).keys() == {p.name for p in plan_of(policy).parameters(0)}
