"""A cost model learns which of two responses is worse, and from which on a response is unsafe."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from rich.console import Console

from asyncflow.run.finetuning import train_reward
from tests import tiny
from workers.data.dataset_files import DataError
from workers.finetune.cost_model import (
    LabelledPairs,
    NumberedPair,
    SafetyPair,
    accuracies,
    cost_loss,
    read_pairs,
    train_cost_model,
)
from workers.finetune.settings import RewardModelSettings, Schedule
from workers.training.micro_batches import micro_batches
from workers.training.models import load_reward, sequence_scores

# An answer is as unsafe as it has digits; none are safe.
ANSWERS = ["abc", "hi", "a1b", "12c", "x123", "9876"]


def digits(text: str) -> int:
    return sum(character.isdigit() for character in text)


PAIRS = [
    SafetyPair(f"{prompt}=", safer, other, digits(safer) == 0, digits(other) == 0)
    for prompt in "pqrstu"
    for safer in ANSWERS
    for other in ANSWERS
    if digits(safer) < digits(other)
]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_bytes(msgspec.json.Encoder().encode_lines(rows))
    return str(path)


def settings(base: Path, tmp_path: Path, rows: Sequence[Any] = PAIRS, **changes: Any) -> RewardModelSettings:
    data, heldout = write(tmp_path / "pairs.jsonl", rows[::2]), write(tmp_path / "heldout.jsonl", rows[1::2])
    made = RewardModelSettings(
        str(base), data, heldout, str(tmp_path / "cost"), Schedule(40, batch_size=16, learning_rate=2e-3), kind="cost"
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_reward(tmp_path_factory.mktemp("reward"))


def test_it_learns_the_order_and_the_sign(base: Path, tmp_path: Path):
    steps: list[int] = []
    result = train_cost_model(settings(base, tmp_path), on_step=lambda step, _: steps.append(step))
    assert steps == list(range(40))
    assert result.heldout_accuracy > 0.8
    assert result.heldout_sign_accuracy is not None
    assert result.heldout_sign_accuracy > 0.9
    heldout = LabelledPairs.tokenized(tiny.tokenizer(), PAIRS[1::2])
    assert accuracies(load_reward(result.output), heldout, 8192) == (
        result.heldout_accuracy,
        result.heldout_sign_accuracy,
    )
    told = json.loads((Path(result.output) / "training.json").read_text())
    assert told["heldout_sign_accuracy"] == result.heldout_sign_accuracy


@torch.no_grad()
def test_the_loss_is_that_of_the_order_and_of_each_sign(reward: Path):
    model, rows = load_reward(reward), [*PAIRS[:2], msgspec.structs.replace(PAIRS[2], chosen_is_safe=None)]
    pairs = LabelledPairs.tokenized(tiny.tokenizer(), rows)
    (whole,) = micro_batches(pairs.pairs.texts, 8192)
    costs = sequence_scores(model, whole).numpy()
    want = 0.0
    for number, row in enumerate(rows):
        safer, other = float(costs[number]), float(costs[number + len(rows)])
        want += math.log1p(math.exp(safer - other))
        for cost, is_safe in ((safer, row.chosen_is_safe), (other, row.rejected_is_safe)):
            if is_safe is not None:
                want += math.log1p(math.exp(cost if is_safe else -cost))
    for budget in (8192, 1):  # all at once, and a pair at a time
        assert float(sum(cost_loss(model, pairs, budget))) == pytest.approx(want / len(rows), rel=1e-5)


@torch.no_grad()
def test_accuracies_count_pairs_and_labelled_responses(reward: Path):
    model, pairs = load_reward(reward), LabelledPairs.tokenized(tiny.tokenizer(), PAIRS[:9])
    (whole,) = micro_batches(pairs.pairs.texts, 8192)
    safer, other = np.split(sequence_scores(model, whole).numpy(), 2)
    right = [(cost > 0) == (sign > 0) for cost, sign in zip([*safer, *other], pairs.signs.ravel(), strict=True)]
    assert accuracies(model, pairs, 100) == (np.mean(other > safer), np.mean(right))
    pairs.signs[:] = 0
    assert accuracies(model, pairs, 100)[1] is None


def test_numbered_pairs_are_read_with_the_safer_first(tmp_path: Path):
    rows = [NumberedPair("p", "bad", "good", 1, False, True), NumberedPair("p", "good", "bad", 0, True, None)]
    assert read_pairs(write(tmp_path / "x.jsonl", rows), {}, "") == [
        SafetyPair("p", "good", "bad", True, False),
        SafetyPair("p", "good", "bad", True, None),
    ]
    with pytest.raises(DataError, match=r"row 1: safer_response_id = 2: want 0 or 1"):
        read_pairs(write(tmp_path / "y.jsonl", [NumberedPair("p", "a", "b", 2)]), {}, "")


def test_pairs_that_nobody_called_safe_or_unsafe_have_no_sign_to_learn(base: Path, tmp_path: Path):
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    with pytest.raises(DataError, match=r"pairs\.jsonl: no row says whether a response is safe"):
        train_cost_model(settings(base, tmp_path, rows))


def test_the_command_trains_a_cost_model_and_prints_both_accuracies(base: Path, tmp_path: Path):
    made = settings(base, tmp_path)
    path = tmp_path / "cost.toml"
    path.write_text(
        f'kind = "cost"\nmodel = "{base}"\ndata = "{made.data}"\nheldout = "{made.heldout}"\n'
        f'output = "{made.output}"\n[schedule]\nsteps = 2\nbatch_size = 4\n'
    )
    console = Console(record=True, width=300)
    train_reward(path, console)
    said = console.export_text()
    assert "cost model: " in said
    assert "held-out pair accuracy " in said
    assert "sign accuracy " in said
