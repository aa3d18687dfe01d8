"""A checkpoint holds tensor slices that any topology can read its own from; an incomplete one is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.parallel.plan import EMBEDDING, Decoder, ShardPlan
from workers.training.checkpoint import Box, Counters, Saved, write_boxes

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
COUNTERS = Counters.now(version=3, updates=6)


def decoder(tied: bool = True, layers: int = 4) -> Decoder:
    return Decoder("qwen3", layers, 16, 24, 4, 4, 8, 32, tied, qkv_bias=True, qk_norm=True)


def whole(of: Decoder, prefix: str) -> dict[str, Tensor]:
    """Every tensor of the model, with all entries different."""
    torch.manual_seed(len(prefix))
    return {prefix + p.name: torch.randn(p.shape) for p in ShardPlan(of).parameters(0)}


def shards(tensors: dict[str, Tensor], prefix: str, plan: ShardPlan, stage: int, index: int) -> dict[str, Box]:
    """A rank's shards of the model, under the names of the checkpoint."""
    found: dict[str, Box] = {}
    for parameter in plan.parameters(stage):
        name, cut = prefix + plan.source(parameter).name, parameter.cut
        values = tensors[name] if cut is None else tensors[name].chunk(plan.tp, cut)[index]
        found[name] = Box(values, plan.shard_start(parameter, index), parameter.shape)
    return found


def places(plan: ShardPlan) -> list[tuple[int, int]]:
    return [(stage, index) for stage in range(plan.pp) for index in range(plan.tp)]


def write(folder: Path, plan: ShardPlan, prefixes: tuple[str, ...] = ("", "exp_avg.")) -> None:
    for writer, (stage, index) in enumerate(places(plan)):
        boxes: dict[str, Box] = {}
        for prefix in prefixes:
            held = shards(whole(plan.decoder, prefix), prefix, plan, stage, index)
            boxes |= {n: held[n] for p in plan.written_by(stage, index) if (n := prefix + p.name)}
        write_boxes(folder, writer, boxes)
    COUNTERS.write(folder)


def read(folder: Path, tensors: dict[str, Box]) -> dict[str, Tensor]:
    room = {name: box._replace(values=torch.full_like(box.values, torch.nan)) for name, box in tensors.items()}
    Saved(folder).read(room)
    return {name: box.values for name, box in room.items()}


def all_of(folder: Path, of: Decoder) -> dict[str, Tensor]:
    return read(folder, {name: Box.all_of(tensor) for name, tensor in whole(of, "").items()})


# --- written and read with different topologies


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("wrote", LAYOUTS)
def test_any_layout_reads_what_another_wrote(tmp_path: Path, wrote: tuple[int, int], tied: bool):
    write(tmp_path, ShardPlan(decoder(tied), *wrote))
    for reads in LAYOUTS:
        plan = ShardPlan(decoder(tied), *reads)
        for place in places(plan):
            for prefix in ("", "exp_avg."):
                wanted = shards(whole(plan.decoder, prefix), prefix, plan, *place)
                found = read(tmp_path, wanted)
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[name], box.values) for name, box in wanted.items())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_box_is_read_from_any_others(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    tensor = torch.randn(rows, columns)
    cuts = [sorted({0, size, *data.draw(st.sets(st.integers(0, size)))}) for size in (rows, columns)]
    ranges = [list(pairwise(ends)) for ends in cuts]
    folder = tmp_path_factory.mktemp("boxes")
    for writer, ((top, bottom), (left, right)) in enumerate((r, c) for r in ranges[0] for c in ranges[1]):
        box = Box(tensor[top:bottom, left:right], (top, left), (rows, columns))
        write_boxes(folder, writer, {"w": box})
    COUNTERS.write(folder)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    part = tensor[top : data.draw(st.integers(top + 1, rows)), left : data.draw(st.integers(left + 1, columns))]
    assert torch.equal(read(folder, {"w": Box(part, (top, left), (rows, columns))})["w"], part)


def test_files_of_whole_tensors_are_a_checkpoint_too(tmp_path: Path):
    save_file(whole(decoder(), ""), tmp_path / "model.safetensors")
    COUNTERS.write(tmp_path)
    plan = ShardPlan(decoder(), 2, 2)
    wanted = shards(whole(decoder(), ""), "", plan, 1, 1)
    assert all(torch.equal(tensor, wanted[name].values) for name, tensor in read(tmp_path, wanted).items())


def test_a_reader_takes_its_own_dtype_and_strides(tmp_path: Path):
    write_boxes(tmp_path, 0, {"w": Box.all_of(torch.arange(6.0).view(2, 3))})
    COUNTERS.write(tmp_path)
    room = torch.empty(3, 2, dtype=torch.bfloat16).movedim(0, 1)
    Saved(tmp_path).read({"w": Box.all_of(room)})
    assert room.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path):
    write(tmp_path, ShardPlan(decoder(), 1, 2))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    first = min(tmp_path.glob("*.safetensors"))
    with safe_open(first, "pt") as file:
        offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert offsets.keys() == load_file(first).keys()


def test_the_counters_and_the_random_state_come_back(tmp_path: Path):
    Counters.now(version=3, updates=6).write(tmp_path)
    expected = torch.rand(3)
    counters = Saved(tmp_path).counters
    assert (counters.version, counters.updates, counters.lora_scaling) == (3, 6, None)
    counters.restore_rng()
    assert torch.equal(torch.rand(3), expected)


# --- refusals


def test_a_model_of_fewer_layers_is_refused(tmp_path: Path):
    write(tmp_path, ShardPlan(decoder()))
    with pytest.raises(ValueError, match=r"tensors differ from the model's: \['model\.layers\.2"):
        Saved(tmp_path).refuse_other(whole(decoder(layers=2), ""))


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path):
    save_file(whole(decoder(), "") | {EMBEDDING: torch.zeros(31, 16)}, tmp_path / "model.safetensors")
    COUNTERS.write(tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \[31, 16\].*; the model's is \[32, 16\]"):
        all_of(tmp_path, decoder())


@pytest.mark.parametrize("lost", range(4))
def test_a_missing_file_is_noticed_whichever_it_is(tmp_path: Path, lost: int):
    write(tmp_path, ShardPlan(decoder(), 1, 4))
    sorted(tmp_path.glob("*.safetensors"))[lost].unlink()
    with pytest.raises(ValueError, match=r"another model's, or a file is missing"):
        all_of(tmp_path, decoder())


def test_a_torn_file_is_named(tmp_path: Path):
    write(tmp_path, ShardPlan(decoder(), 1, 2))
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name}: this part of the checkpoint can't be read"):
        Saved(tmp_path)


def test_hidden_files_are_not_read(tmp_path: Path):
    write(tmp_path, ShardPlan(decoder()))
    expected = Saved(tmp_path)._tensors
    (tmp_path / "._shard-00000-model-00001-of-00001.safetensors").write_text("what macOS keeps beside a file")
    assert Saved(tmp_path)._tensors == expected


def test_a_folder_without_counters_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match=r"trainer\.json: no checkpoint of a trained model"):
        Saved(tmp_path)
    (tmp_path / "trainer.json").write_bytes(b'{"torch_rng": "\xff"}')
    with pytest.raises(ValueError, match=r"trainer\.json: no checkpoint of a trained model"):
        Saved(tmp_path)


def test_shards_of_an_older_version_are_refused(tmp_path: Path):
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(ValueError, match="of an older version, whose shards are not read any more"):
        Saved(tmp_path)
