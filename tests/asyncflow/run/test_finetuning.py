"""`asyncflow sft` and `reward-model`: their settings are checked like a recipe's, before anything loads."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from asyncflow.recipe.config import BadInput
from asyncflow.run.finetuning import finetune, read_settings
from tests import tiny
from workers.finetune.settings import RewardModelSettings, SftSettings

SFT = 'model = "m"\ndata = "d"\noutput = "o"\nschedule = { steps = 3 }\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sft.toml"
    path.write_text(SFT)
    return path


def test_overrides_are_applied(file: Path):
    settings = read_settings(file, SftSettings, ["schedule.steps=9", "lora.rank=4", "heldout=h.jsonl"])
    assert (settings.schedule.steps, settings.lora.rank, settings.heldout) == (9, 4, "h.jsonl")
    assert read_settings(file, RewardModelSettings, []).heldout == "", "held-out pairs are optional"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.step=9", "unknown key schedule.step, did you mean 'steps'?"),
        ("helout=h", "unknown key helout, did you mean 'heldout'?"),
        ("lora=true", "Expected `object`, got `bool` - at `$.lora`"),
        ("schedule.batch_size=0", "schedule.batch_size = 0: want 1 or more"),
        ("evaluate_every=5", "evaluate_every = 5: there is no heldout to evaluate"),
        ("optimizer.decay_steps=5", "optimizer.decay_steps is for RL runs; schedule.decay sets the decay here"),
    ],
)
def test_a_mistake_is_named_with_its_key(file: Path, override: str, message: str):
    with pytest.raises(BadInput) as refused:
        read_settings(file, SftSettings, [override])
    assert str(refused.value) == f"settings {file}: {message}"


def test_dropout_of_a_model_that_has_none_is_refused(file: Path, tmp_path: Path):
    tiny.make_policy(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "response": "2"}')
    paths = {"model": "base", "data": "rows.jsonl", "output": "sft"}
    given = [f"{key}={str(tmp_path / name)!r}" for key, name in paths.items()]
    with pytest.raises(BadInput, match=r"dropout = true: .*base has none in its config\.json .*or leave dropout out"):
        finetune(file, Console(quiet=True), ["dropout=true", *given])


def test_the_output_has_the_curve_the_answers_and_a_report(tmp_path: Path):
    tiny.make_policy(tmp_path / "base")
    rows = [{"prompt": f"{a}+1=", "response": str(a + 1)} for a in range(9)]
    (tmp_path / "rows.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(rows))
    file = tmp_path / "sft.toml"
    file.write_text("schedule = { steps = 2, batch_size = 4 }\nsample_tokens = 4\nsamples = 1\n")
    paths = {"model": "base", "data": "rows.jsonl", "heldout": "rows.jsonl", "output": "sft"}
    console = Console(quiet=True)
    finetune(file, console, [f"{key}={str(tmp_path / name)!r}" for key, name in paths.items()])
    written = {path.name for path in (tmp_path / "sft").iterdir()}
    assert {"metrics.jsonl", "samples.jsonl", "training.log", "report.html", "training.json"} <= written
