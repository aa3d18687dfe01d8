"""Supervised fine-tuning lowers the loss of the response tokens only, and is deterministic."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from asyncflow.observe.journal import read_lines
from tests import tiny, tiny_tokenizers
from workers.data.datasets import DataError
from workers.data.hf_folder import end_tokens_of
from workers.data.token_rows import Text, TokenRows, tokenized
from workers.data.tokenizer import Tokenizer
from workers.finetune.loop import batches
from workers.finetune.settings import Schedule, SftSettings
from workers.finetune.sft import response_loss, train_sft
from workers.parallel.backends import trained_model
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Lora, Model
from workers.training.optimizer_step import LrSchedule, StepRefused

ROWS = [Text(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sft.jsonl"
    path.write_bytes(msgspec.json.Encoder().encode_lines([{"prompt": p, "response": r} for p, r, *_ in ROWS]))
    return path


def settings(base: Path, data: Path, output: Path, steps: int = 30, budget: int = 8192) -> SftSettings:
    schedule = Schedule(steps, batch_size=32, learning_rate=2e-3, tokens_per_micro_batch=budget)
    return SftSettings(str(base), str(data), str(output), schedule, samples=0)


def loss_of(folder: Path | str, tokens: TokenRows, budget: int = 8192) -> float:
    model = trained_model(Model(path=str(folder)), ONE_DEVICE)
    return float(sum(model.forward(tokens, budget, response_loss(tokens))))


def test_the_loss_falls_and_the_output_is_a_transformers_folder(base: Path, data: Path, tmp_path: Path):
    seen: list[tuple[int, float]] = []
    result = train_sft(settings(base, data, tmp_path / "sft"), on_step=lambda step, loss: seen.append((step, loss)))
    assert [loss for _, loss in seen] == result.losses
    assert [step for step, _ in seen] == list(range(30))
    assert np.mean(result.losses[-5:]) < 0.5 * result.losses[0]
    tokens = tokenized(Tokenizer(result.output), ROWS)
    assert loss_of(result.output, tokens) < 0.5 * result.losses[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sft"]  # no temporary file is left


def test_the_same_seed_gives_the_same_weights_however_the_batch_is_cut(base: Path, data: Path, tmp_path: Path):
    torch.manual_seed(1)
    train_sft(settings(base, data, tmp_path / "a", steps=3))
    torch.manual_seed(2)  # it does not use the global random state
    train_sft(settings(base, data, tmp_path / "b", steps=3))
    train_sft(settings(base, data, tmp_path / "cut", steps=3, budget=50))
    a, b, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.allclose(a[name], cut[name], atol=2e-4) for name in a)


def test_the_container_of_the_data_changes_no_bit(base: Path, data: Path, tmp_path: Path):
    rows = pa.Table.from_pylist([msgspec.json.decode(line) for line in data.read_bytes().splitlines()])
    pq.write_table(rows.rename_columns({"response": "completion"}), tmp_path / "sft.parquet")
    train_sft(settings(base, data, tmp_path / "lines", steps=3))
    train_sft(settings(base, tmp_path / "sft.parquet", tmp_path / "table", steps=3))
    lines, table = (load_file(tmp_path / name / "model.safetensors") for name in ("lines", "table"))
    assert all(torch.equal(lines[name], table[name]) for name in lines)


def test_the_loss_is_the_mean_over_response_tokens_with_their_end(base: Path):
    model = trained_model(Model(path=str(base)), ONE_DEVICE).module
    tokens = tokenized(Tokenizer(base), [Text("1+1=", "2"), Text("59+60=", "119")])
    by_hand = [
        tiny.log_probs(model, tiny.encode(prompt), np.append(tiny.encode(response), np.int32(tiny.EOS_ID)))
        for prompt, response in (("1+1=", "2"), ("59+60=", "119"))
    ]
    want = -float(np.concatenate(by_hand).mean())
    assert loss_of(base, tokens) == pytest.approx(want, abs=1e-5)
    assert loss_of(base, tokens, budget=1) == pytest.approx(want, abs=1e-5)  # one row at a time


def test_a_truncated_response_has_no_end(base: Path):
    tokens = tokenized(Tokenizer(base), [Text("1=", "1"), Text("1=", "1", truncated=True)])
    assert tokens.responses[0].tolist() == [*tiny.encode("1"), tiny.EOS_ID]
    assert tokens.responses[1].tolist() == [*tiny.encode("1")]


def test_bad_data_and_an_existing_output_are_refused_before_the_model_is_touched(data: Path, tmp_path: Path):
    absent = tmp_path / "no model"
    with pytest.raises(FileExistsError, match="exists already"):
        train_sft(settings(absent, data, tmp_path))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p"}')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: no field 'response'"):
        train_sft(settings(absent, bad, tmp_path / "sft"))


def test_a_loss_that_is_not_finite_ends_training_without_an_output(base: Path, data: Path, tmp_path: Path):
    schedule = Schedule(20, batch_size=8, learning_rate=1e30)
    with pytest.raises(StepRefused, match=r"step \d+ at a learning rate of up to 1e\+30: (loss|gradient norm) is"):
        train_sft(SftSettings(str(base), str(data), str(tmp_path / "sft"), schedule, samples=0))
    assert not (tmp_path / "sft").exists()
    assert read_lines(tmp_path / ".sft.partial" / "metrics.jsonl"), "what it said on its way is kept"


def test_the_journal_has_every_step_and_the_held_out_loss_at_intervals(base: Path, data: Path, tmp_path: Path):
    given = settings(base, data, tmp_path / "sft", steps=5)
    result = train_sft(msgspec.structs.replace(given, heldout=str(data), evaluate_every=2))
    lines = read_lines(tmp_path / "sft" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines[1:]] == result.losses
    assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 2, 4, 5]
    assert lines[-1]["heldout_loss"] == result.heldout_loss
    tokens = tokenized(Tokenizer(result.output), ROWS)
    assert result.heldout_loss == pytest.approx(loss_of(result.output, tokens), abs=1e-5)
    assert lines[0]["heldout_loss"] == pytest.approx(loss_of(base, tokens), abs=1e-5)
    assert "step 5: loss" in (tmp_path / "sft" / "training.log").read_text()


def test_a_few_prompts_are_answered_before_and_after(base: Path, data: Path, tmp_path: Path):
    given = settings(base, data, tmp_path / "sft", steps=60)
    train_sft(msgspec.structs.replace(given, samples=2, sample_tokens=4))
    first, second = read_lines(tmp_path / "sft" / "samples.jsonl")
    assert [(row["prompt"], row["demonstrated"]) for row in (first, second)] == [("0+0=", "0"), ("0+1=", "1")]
    assert first["before"] != first["after"]
    assert all(1 <= len(row["after"]) <= 2 for row in (first, second)), "it has learned to end"


def test_adapters_train_and_the_output_has_them_and_the_merged_weights(base: Path, data: Path, tmp_path: Path):
    given = settings(base, data, tmp_path / "sft", steps=20)
    result = train_sft(msgspec.structs.replace(given, lora=Lora(rank=8)))
    assert result.losses[-1] < 0.8 * result.losses[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "sft"))
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert changed and all("_proj." in name for name in changed)
    assert (tmp_path / "sft" / "adapters" / "adapter_model.safetensors").exists()


def test_a_learning_rate_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="learning_rate = nan: want more than 0"):
        Schedule(steps=1, learning_rate=math.nan)


def test_every_epoch_visits_each_row_once_in_a_new_order():
    rows = np.concatenate(list(batches(10, Schedule(steps=6, batch_size=5))))
    epochs = rows.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert [len(b) for b in batches(3, Schedule(steps=2, batch_size=8))] == [8, 8]  # fewer rows than a batch


def test_the_learning_rate_rises_then_decays():
    schedule = LrSchedule(2, "cosine", 2, 12)
    assert [schedule.factor(update) for update in (1, 2, 3, 8)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert LrSchedule(2, "linear", 2, 12).factor(8) == pytest.approx(0.5)
    assert LrSchedule(0, "constant", 0, 12).factor(12) == 1.0


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ("steps", "1 or more"),
        ("batch_size", "1 or more"),
        ("learning_rate", "more than 0"),
        ("tokens_per_micro_batch", "1 or more"),
    ],
)
def test_a_schedule_of_nothing_is_refused(field: str, least: str):
    with pytest.raises(ValueError, match=f"{field} = 0: want {least}"):
        Schedule(**{"steps": 1, field: 0})  # type: ignore[arg-type]


def with_bos(base: Path, folder: Path, **config: str) -> Path:
    """The model with a tokenizer that writes BOS, and a template whose turns don't end with the eos token."""
    shutil.copytree(base, folder)
    made = tiny_tokenizers.with_bos()
    made.add_special_tokens(["<turn>"])
    template = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    tiny_tokenizers.save(made, folder, bos_token=tiny_tokenizers.BOS, chat_template=template, **config)
    return folder


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with rows for BOS and the end of a turn."""
    return tiny.make_policy(tmp_path_factory.mktemp("larger"), vocabulary=tiny_tokenizers.BOS_ID + 2)


def test_the_tokenizers_files_are_copied_byte_for_byte(larger: Path, data: Path, tmp_path: Path):
    model = with_bos(larger, tmp_path / "model", tokenizer_class="LlamaTokenizerFast")  # transformers would rebuild it
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    train_sft(settings(model, data, tmp_path / "sft", steps=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "sft" / name).read_bytes() == (model / name).read_bytes()


def test_what_ends_a_turn_ends_responses_from_then_on(larger: Path, data: Path, tmp_path: Path):
    model, turn = with_bos(larger, tmp_path / "model"), tiny_tokenizers.BOS_ID + 1
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}')
    train_sft(settings(model, chats, tmp_path / "chat", steps=1))
    assert end_tokens_of(model) == {tiny.EOS_ID}
    assert end_tokens_of(tmp_path / "chat") == {tiny.EOS_ID, turn}
    train_sft(settings(model, data, tmp_path / "text", steps=1))
    assert end_tokens_of(tmp_path / "text") == {tiny.EOS_ID}


def test_a_token_without_a_row_of_the_model_is_refused(base: Path, data: Path, tmp_path: Path):
    model = with_bos(base, tmp_path / "model")
    with pytest.raises(DataError, match=r"sft\.jsonl:1: the token '<bos>' has id \d+, and the model of .*model has"):
        train_sft(settings(model, data, tmp_path / "sft"))
