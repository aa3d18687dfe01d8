"""Supervised fine-tuning applies a model's dropout only where the settings say so, with masks that the seed decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from asyncflow.observe.journal import read_lines
from tests import tiny
from workers.finetune.dropout import NoDropout, dropout_by_seed, refuse_without_dropout
from workers.finetune.settings import Schedule, SftSettings
from workers.finetune.sft import train_sft
from workers.parallel.backends import trained_model
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Model

RATES = ("attn_pdrop", "embd_pdrop", "resid_pdrop")  # of GPT-2
ROWS = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, whose dropout is a tenth."""
    return tiny.make_gpt2(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, with a config that has no dropout."""
    folder = tiny.make_gpt2(tmp_path_factory.mktemp("without"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(RATES, 0.0)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sft.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{a}+{a}=", "response": str(2 * a)}) for a in range(ROWS)))
    return path


def trained(model: Path, data: Path, output: Path, *, dropout: bool = True) -> Path:
    """The folder after a few steps of all rows, which are the held-out ones too."""
    schedule = Schedule(steps=3, batch_size=ROWS, learning_rate=1e-3, seed=1)
    train_sft(SftSettings(str(model), str(data), str(output), schedule, samples=0, heldout=str(data), dropout=dropout))
    return output


def equal(one: Path, other: Path) -> bool:
    tensors, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def on(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(base, data, tmp_path_factory.mktemp("on") / "sft")


@pytest.fixture(scope="module")
def off(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(base, data, tmp_path_factory.mktemp("off") / "sft", dropout=False)


def test_a_seed_repeats_a_training_and_the_global_random_state_is_not_used(
    base: Path, data: Path, on: Path, tmp_path: Path
):
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = trained(base, data, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(on, again)


def test_it_is_off_unless_it_is_asked_for(without: Path, data: Path, on: Path, off: Path, tmp_path: Path):
    assert not SftSettings("model", "data", "output", Schedule(steps=1)).dropout
    assert equal(off, trained(without, data, tmp_path / "never", dropout=False))
    assert not equal(off, on)


def test_steps_have_dropout_and_evaluation_has_none(on: Path, off: Path):
    with_it, without_it = (read_lines(folder / "metrics.jsonl") for folder in (on, off))
    heldout = without_it[0]["heldout_loss"]
    assert with_it[0]["heldout_loss"] == heldout
    assert without_it[1]["loss"] == pytest.approx(heldout, abs=1e-5)
    assert with_it[1]["loss"] != pytest.approx(heldout, abs=1e-3)


def test_masks_follow_from_seed_and_step(base: Path):
    model = trained_model(Model(path=str(base)), ONE_DEVICE)
    tokens = torch.from_numpy(tiny.encode("1+1=2")).long()[None]

    @torch.no_grad()
    def logits(seed: int, step: int) -> torch.Tensor:
        with dropout_by_seed(model, seed, step):
            return model.module(input_ids=tokens).logits

    assert torch.equal(logits(1, 5), logits(1, 5))
    assert not torch.equal(logits(1, 5), logits(1, 6))
    assert not torch.equal(logits(1, 5), logits(2, 5))
    assert not model.module.training


def test_a_model_without_dropout_is_refused(tmp_path: Path):
    tiny.make_policy(tmp_path)
    with pytest.raises(NoDropout, match=r"dropout = true: .* has none in its config\.json"):
        refuse_without_dropout(AutoConfig.from_pretrained(tmp_path), tmp_path)


def test_the_dropout_of_a_head_that_is_not_used_does_not_count(base: Path, without: Path, data: Path, tmp_path: Path):
    refuse_without_dropout(AutoConfig.from_pretrained(base), base)
    with pytest.raises(NoDropout, match=r"\{'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0\}"):
        trained(without, data, tmp_path / "out")
