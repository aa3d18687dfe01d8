"""A decoder shard computes what transformers computes with the same weights, as one pass and token by token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

from tests import families, tiny
from workers.parallel.decoder import DecoderShard, flat, laid_out, unflat
from workers.parallel.groups import RankGroup
from workers.parallel.plan import EMBEDDING, Decoder, Parameter, ShardPlan
from workers.parallel.shard_reader import read_shard
from workers.training.models import load_causal

ALONE = RankGroup((0,), 0, None)
TOKENS = torch.tensor([[5, 9, 11, 2, 7, 3], [4, 8, 6, 30, 21, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"))


def stages(folder: Path, number: int) -> list[DecoderShard]:
    """The pipeline stages of a model, all in this process."""
    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    plan = ShardPlan(Decoder.of(config.to_dict()), number)
    shards = [DecoderShard(config, plan, stage, ALONE) for stage in range(number)]
    for shard in shards:
        shard.install(parameters(read_shard(folder, plan, shard.stage, 0)))
    return shards


def parameters(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def through(shards: list[DecoderShard], tokens: Tensor, mask: Tensor, **options: Tensor) -> Tensor:
    hidden = None
    for shard in shards:
        hidden = shard(tokens, mask, hidden, **options)
    assert hidden is not None
    return hidden


@torch.no_grad()
def whole_logits(folder: Path) -> Tensor:
    return load_causal(folder)(input_ids=TOKENS, attention_mask=MASK, use_cache=False).logits


@pytest.mark.parametrize("number", [1, 2])
def test_stages_one_after_another_are_the_model(folder: Path, number: int):
    ours, theirs = through(stages(folder, number), TOKENS, MASK), whole_logits(folder)
    inside = MASK.bool()
    assert torch.allclose(ours[inside], theirs[inside], atol=1e-6)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_stages_of_every_family_with_a_plan_are_the_model(tmp_path: Path, family: str):
    folder = families.make(family, tmp_path)
    ours, theirs = through(stages(folder, 2), TOKENS, MASK), whole_logits(folder)
    assert torch.allclose(ours[MASK.bool()], theirs[MASK.bool()], atol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_a_cache_gives_the_same_logits_token_by_token(folder: Path, number: int):
    shards = stages(folder, number)
    caches = [DynamicCache() for _ in shards]
    logits = []
    with torch.no_grad():
        for start, stop in [(0, 3), (3, 4), (4, 5), (5, 6)]:
            hidden = None
            for shard, cache in zip(shards, caches, strict=True):
                hidden = shard(TOKENS[:, start:stop], MASK[:, :stop], hidden, cache=cache)
            logits.append(hidden)
    inside = MASK.bool()
    assert torch.allclose(torch.cat(logits, 1)[inside], whole_logits(folder)[inside], atol=1e-5)


def test_positions_are_the_callers_where_given(folder: Path):
    """For left-padded rows, as in an engine that decodes all rows at the same column."""
    tokens, mask = torch.tensor([[0, 0, 5, 9, 11]]), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    padded = through(stages(folder, 1), tokens, mask, positions=positions)[:, 2:]
    assert torch.allclose(padded, through(stages(folder, 1), tokens[:, 2:], mask[:, 2:]), atol=1e-5)


def test_a_tied_head_is_the_embedding(folder: Path):
    (shard,) = stages(folder, 1)
    assert shard.get_parameter("lm_head.weight") is shard.get_parameter(EMBEDDING)


def test_a_cleared_shard_computes_nothing(folder: Path):
    (shard,) = stages(folder, 1)
    shard.clear()
    with pytest.raises((RuntimeError, NotImplementedError)):
        through([shard], TOKENS, MASK)


def test_other_parameters_are_refused(folder: Path):
    (shard,) = stages(folder, 1)
    own = {p.name: shard.get_parameter(p.name) for p in shard.plan.parameters(0)}
    with pytest.raises(ValueError, match=r"differ from the plan's in \['model.norm.weight'\]"):
        shard.install({name: p for name, p in own.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[3\], its shard \[128\]"):
        shard.install(own | parameters({"model.norm.weight": torch.zeros(3)}))


@pytest.mark.parametrize("cut", [0, 1, None])
def test_shards_of_ranks_one_after_another_are_the_whole_in_memory(cut: int | None):
    whole, parameter = torch.arange(24.0).view(4, 6), Parameter("any", (4, 6), cut)
    shards = whole.chunk(2, cut) if cut is not None else [whole]
    entries = torch.cat([flat(laid_out(shard, parameter), parameter) for shard in shards])
    assert torch.equal(unflat(entries, parameter, (4, 6)), whole)


def test_entries_of_a_tensor_that_lies_otherwise_are_refused():
    with pytest.raises(RuntimeError):
        flat(torch.zeros(4, 6), Parameter("any", (4, 6), cut=1))
