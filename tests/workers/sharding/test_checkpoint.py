"""A checkpoint in shards: what one layout wrote, any other reads, tensor by tensor, and nothing of it twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.sharding.checkpoint import Part, parts, read_parts, write_shard, written_by
from workers.sharding.plan import EMBEDDING, TOKEN_HEAD, Decoder, ShardPlan

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


def decoder(tied: bool = True, layers: int = 4) -> Decoder:
    return Decoder("qwen3", layers, 16, 24, 4, 4, 8, 32, tied, qkv_bias=True, qk_norm=True)


def whole(of: Decoder, prefix: str) -> dict[str, Tensor]:
    """Every tensor of the model, each entry another number."""
    torch.manual_seed(len(prefix))
    return {p.name: torch.randn(p.shape) for p in ShardPlan(of).parameters(0)}


def shard(tensors: dict[str, Tensor], plan: ShardPlan, stage: int, index: int) -> dict[str, Tensor]:
    tied = {**tensors, TOKEN_HEAD: tensors.get(TOKEN_HEAD, tensors[EMBEDDING])}
    return {
        p.name: tied[p.name] if p.cut is None else tied[p.name].chunk(plan.tp, p.cut)[index]
        for p in plan.parameters(stage)
    }


def places(plan: ShardPlan) -> list[tuple[int, int]]:
    return [(stage, index) for stage in range(plan.pp) for index in range(plan.tp)]


def write(folder: Path, plan: ShardPlan, prefixes: tuple[str, ...] = ("", "moment.")) -> None:
    for stage, index in places(plan):
        named = {prefix: shard(whole(plan.decoder, prefix), plan, stage, index) for prefix in prefixes}
        write_shard(folder, plan, stage, index, named)


# --- pure


def test_part_of_a_part_is_found():
    assert parts(12, have=2, want=4, index=1) == [Part(0, 3, 6)]
    assert parts(12, have=4, want=2, index=1) == [Part(2, 0, 3), Part(3, 0, 3)]
    assert parts(12, have=2, want=3, index=1) == [Part(0, 4, 6), Part(1, 0, 2)]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.data())
def test_parts_are_the_entries_of_the_wanted_one(have: int, want: int, times: int, data: st.DataObject):
    size = have * want * times
    entries, index = torch.arange(size), data.draw(st.integers(0, want - 1))
    held = entries.chunk(have)
    found = torch.cat([held[p.shard][p.start : p.stop] for p in parts(size, have, want, index)])
    assert torch.equal(found, entries.chunk(want)[index])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_entry_is_written_once(layout: tuple[int, int], tied: bool):
    plan = ShardPlan(decoder(tied), *layout)
    written = sum(plan.shard_elements(p) for place in places(plan) for p in written_by(plan, *place))
    assert written == sum(p.elements for p in ShardPlan(plan.decoder).parameters(0))


# --- files


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("wrote", LAYOUTS)
def test_any_layout_reads_what_another_wrote(tmp_path: Path, wrote: tuple[int, int], tied: bool):
    written = ShardPlan(decoder(tied), *wrote)
    write(tmp_path, written)
    for reads in LAYOUTS:
        plan = ShardPlan(written.decoder, *reads)
        for stage, index in places(plan):
            read = read_parts(tmp_path, written, plan, stage, index, ("", "moment."))
            for prefix, named in read.items():
                expected = shard(whole(plan.decoder, prefix), plan, stage, index)
                assert named.keys() == expected.keys()
                assert all(torch.equal(tensor, expected[name]) for name, tensor in named.items())


def test_a_model_of_fewer_layers_is_refused(tmp_path: Path):
    write(tmp_path, ShardPlan(decoder()), ("",))
    with pytest.raises(ValueError, match=r"shard-0-0\.safetensors: tensors differ from the model's: \['model\.layers"):
        read_parts(tmp_path, ShardPlan(decoder(layers=2)), ShardPlan(decoder(layers=2)), 0, 0, ("",))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path):
    plan = ShardPlan(decoder())
    write(tmp_path, plan, ("",))
    path = tmp_path / "shard-0-0.safetensors"
    save_file(load_file(path) | {EMBEDDING: torch.zeros(31, 16)}, path)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(31, 16\), the model's is \(32, 16\)"):
        read_parts(tmp_path, plan, plan, 0, 0, ("",))


def test_a_missing_file_is_named(tmp_path: Path):
    plan = ShardPlan(decoder())
    with pytest.raises(ValueError, match=r"shard-0-0\.safetensors: this part of the checkpoint can't be read"):
        read_parts(tmp_path, plan, plan, 0, 0, ("",))
