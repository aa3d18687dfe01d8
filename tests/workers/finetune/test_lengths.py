"""No row beyond the model's context is trained: it is refused, left out or cut, and always counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from workers.data.datasets import DataError
from workers.data.token_rows import TokenRows
from workers.finetune.cost_model import train_cost_model
from workers.finetune.lengths import fit_to_context
from workers.finetune.reward_model import train_reward_model
from workers.finetune.settings import RewardModelSettings, Schedule, SftSettings
from workers.finetune.sft import train_sft

Make = Callable[..., Path]
SCHEDULE = Schedule(2, batch_size=2)
LONG = [
    {"prompt": "1+1=", "response": "2"},
    {"prompt": "1+1=", "response": "2" * 400},
    {"prompt": "3" * 500, "response": "4"},
]
FOUND = "2 of 3 rows: {0}:2 has 405 tokens, {0}:3 has 502 tokens: the model's context is {1} tokens"


@pytest.fixture(params=["llama-like", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, int]:
    """A model's folder and its context; GPT-2 has a name of its own for it, and no position beyond it."""
    if request.param == "gpt2":
        return str(tiny.make_gpt2(tmp_path / "model")), 64
    return str(tiny.make_policy(tmp_path / "model", context=256)), 256


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_an_overlong_demonstration_is_refused(folder: tuple[str, int], tmp_path: Path):
    model, context = folder
    path = write(tmp_path / "x.jsonl", LONG)
    settings = SftSettings(model, path, str(tmp_path / "out"), SCHEDULE)
    with pytest.raises(DataError) as error:
        train_sft(settings)
    assert str(error.value) == (
        f"{FOUND.format(path, context)}; want shorter rows, or overlong = 'skip', which leaves these out, or overlong "
        "= 'cut', which ends their responses there"
    )


@pytest.mark.parametrize(
    ("overlong", "skipped", "cut", "done"),
    [("skip", 2, 0, "left out 2"), ("cut", 1, 1, "left out 1 and cut 1 short")],
)
def test_it_is_left_out_or_cut_where_the_settings_say_so(
    folder: tuple[str, int], tmp_path: Path, overlong: Any, skipped: int, cut: int, done: str
):
    model, context = folder
    path, warnings = write(tmp_path / "x.jsonl", LONG), list[str]()
    settings = SftSettings(model, path, str(tmp_path / "out"), SCHEDULE, overlong=overlong)
    result = train_sft(settings, on_warning=warnings.append)
    assert (result.skipped, result.cut) == (skipped, cut)
    assert warnings == [f"{done} of the overlong rows, {FOUND.format(path, context)}"]
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (written["rows_skipped"], written["rows_cut"]) == (skipped, cut)


def test_a_cut_response_fills_the_context_and_has_no_end(tmp_path: Path):
    model = str(tiny.make_policy(tmp_path / "model", context=10))
    path = write(tmp_path / "x.jsonl", [{}, {}, {}])
    rows = TokenRows.of([[1] * 3, [1] * 9, [1] * 10], [[2, 3], [2, 3], [2, 3]])
    fitted = fit_to_context(rows, "cut", path, model)
    assert [row.tolist() for row in fitted.rows.prompts] == [[1] * 3, [1] * 9]
    assert [row.tolist() for row in fitted.rows.responses] == [[2, 3], [2]]
    assert (fitted.kept.tolist(), fitted.skipped, fitted.cut) == ([0, 1], 1, 1)


def test_rows_that_fit_stay_what_they_are(tmp_path: Path):
    model = str(tiny.make_policy(tmp_path / "model", context=10))
    rows = TokenRows.of([[1] * 5], [[2] * 5])
    assert fit_to_context(rows, "refuse", "x", model).rows is rows


def test_without_a_row_that_fits_nothing_is_trained(tmp_path: Path):
    model = str(tiny.make_policy(tmp_path / "model", context=10))
    path = write(tmp_path / "x.jsonl", [{}])
    with pytest.raises(DataError, match=r"x\.jsonl: none of its rows is short enough, 1 of 1 rows: .*:1 has 13 tokens"):
        fit_to_context(TokenRows.of([[1] * 12], [[2]]), "skip", path, model)


PAIRS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "3", "chosen_is_safe": True, "rejected_is_safe": False},
    {"prompt": "1+1=", "chosen": "2", "rejected": "3" * 60, "chosen_is_safe": True, "rejected_is_safe": True},
    {"prompt": "2+1=", "chosen": "3", "rejected": "4", "chosen_is_safe": False, "rejected_is_safe": False},
]


@pytest.mark.parametrize(("kind", "train"), [("reward", train_reward_model), ("cost", train_cost_model)])
def test_a_pair_with_an_overlong_response_is_refused_or_left_out_whole(
    tmp_path: Path, kind: Any, train: Callable[..., Any]
):
    model = str(tiny.make_gpt2(tmp_path / "model"))
    data, heldout = write(tmp_path / "x.jsonl", PAIRS), write(tmp_path / "y.jsonl", PAIRS[:2])

    def settings(overlong: Any) -> RewardModelSettings:
        output = str(tmp_path / f"out-{overlong}")
        return RewardModelSettings(model, data, output, SCHEDULE, heldout=heldout, kind=kind, overlong=overlong)

    found = f"1 of 3 rows: {data}:2 has 65 tokens: the model's context is 64 tokens"
    with pytest.raises(DataError) as error:
        train(settings("refuse"))
    assert str(error.value) == f"{found}; want shorter rows, or overlong = 'skip', which leaves these pairs out"
    warnings: list[str] = []
    result = train(settings("skip"), on_warning=warnings.append)
    assert result.skipped == 2
    assert warnings[0] == f"left out 1 of the overlong rows, {found}"
    assert np.isfinite(result.losses).all()
