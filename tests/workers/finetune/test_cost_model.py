"""A cost model learns which of two responses is worse, and whether a response is unsafe (a positive cost)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from asyncflow.run.finetuning import train_reward
from tests import tiny
from workers.data.dataset_files import DataError
from workers.data.tokenizer import Tokenizer
from workers.finetune.cost_model import (
    NumberedPair,
    SafetyPair,
    cost_loss,
    read_pairs,
    sign_accuracy_of,
    signs_of,
    train_cost_model,
)
from workers.finetune.reward_model import PAIR, pair_accuracy, pair_scores, tokenized_pairs
from workers.finetune.settings import RewardModelSettings, Schedule
from workers.parallel.backends import trained_model
from workers.parallel.model import ParallelModel
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Model

# An answer is the more unsafe the more digits it has; without digits it is safe.
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
        str(base),
        data,
        str(tmp_path / "cost"),
        Schedule(40, batch_size=16, learning_rate=2e-3),
        heldout=heldout,
        kind="cost",
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_reward(tmp_path_factory.mktemp("reward"))


def model_at(folder: str | Path) -> ParallelModel:
    return trained_model(Model(path=str(folder)), ONE_DEVICE, head="score")


def costs_of(folder: str | Path, rows: Sequence[SafetyPair], budget: int = 8192) -> npt.NDArray[np.float32]:
    return pair_scores(model_at(folder), tokenized_pairs(Tokenizer(folder), rows, "rows"), budget)


def test_it_learns_the_order_and_the_sign(base: Path, tmp_path: Path):
    steps: list[int] = []
    result = train_cost_model(settings(base, tmp_path), on_step=lambda step, _: steps.append(step))
    assert steps == list(range(40))
    assert result.heldout_accuracy is not None and result.heldout_accuracy > 0.8
    assert result.heldout_sign_accuracy is not None
    assert result.heldout_sign_accuracy > 0.9
    costs = costs_of(result.output, PAIRS[1::2])
    assert pair_accuracy(-costs) == result.heldout_accuracy
    assert sign_accuracy_of(costs, signs_of(PAIRS[1::2])) == result.heldout_sign_accuracy
    results = json.loads((Path(result.output) / "training.json").read_text())
    assert results["heldout_sign_accuracy"] == result.heldout_sign_accuracy


def test_the_loss_is_that_of_the_order_and_of_each_sign(reward: Path):
    rows = [*PAIRS[:2], msgspec.structs.replace(PAIRS[2], chosen_is_safe=None)]
    pairs, loss = tokenized_pairs(Tokenizer(reward), rows, "rows"), cost_loss(signs_of(rows))
    want = 0.0
    for row, (safer, other) in zip(rows, costs_of(reward, rows).tolist(), strict=True):
        want += math.log1p(math.exp(safer - other))
        for cost, is_safe in ((safer, row.chosen_is_safe), (other, row.rejected_is_safe)):
            if is_safe is not None:
                want += math.log1p(math.exp(cost if is_safe else -cost))
    for budget in (8192, 1):  # all at once, and a pair at a time
        assert model_at(reward).backward(pairs, budget, loss, PAIR) == pytest.approx(want / len(rows), rel=1e-5)


def test_accuracies_count_pairs_and_labelled_responses(reward: Path):
    costs, signs = costs_of(reward, PAIRS[:9], budget=100), signs_of(PAIRS[:9])
    safer, other = costs.T
    right = [(cost > 0) == (sign > 0) for cost, sign in zip(costs.ravel(), signs, strict=True)]
    assert pair_accuracy(-costs) == np.mean(other > safer)
    assert sign_accuracy_of(costs, signs) == np.mean(right)
    assert sign_accuracy_of(costs, np.zeros_like(signs)) is None


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
