"""`asyncflow samples`: which of the kept texts it prints, and that no text can harm a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from asyncflow.cli.samples import print_samples, samples_of, visible
from asyncflow.observe.journal import MetricsJournal
from protocols.control.errors import BadInput
from protocols.control.samples import SampleLine, ShownSample


def sample(number: int, reward: float, prompt: str = "5+7=", response: str = "12<eos>") -> ShownSample:
    return ShownSample(
        sample=number,
        prompt=prompt,
        response=response,
        reference="12",
        reward=reward,
        parts={"right": reward},
        advantage=0.5,
        versions=(2, 3),
        tokens=7,
        cut=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with tables of steps 1 and 10."""
    (tmp_path / "recipe.toml").write_text('name = "test"\n')
    journal = MetricsJournal(tmp_path / "samples.jsonl")
    journal.append(SampleLine(step=1, rows=[sample(1, 0.1), sample(2, 0.9, prompt="2+2=")]))
    journal.append(SampleLine(step=10, rows=[sample(3, float("nan")), sample(4, 0.7)]))
    journal.close()
    return tmp_path


def numbers(folder: Path, *, step: int | None = None, worst: int = 0, best: int = 0, prompt: str = "") -> list[int]:
    return [row["sample"] for row in samples_of(folder, step=step, worst=worst, best=best, prompt=prompt)]


def test_by_default_the_newest_table_is_printed(folder: Path):
    assert numbers(folder) == [3, 4]
    assert numbers(folder, step=1) == [1, 2]


def test_the_worst_and_the_best_are_chosen_from_all_steps_or_from_one(folder: Path):
    assert numbers(folder, worst=2) == [3, 1], "a reward that is no number is the lowest"
    assert numbers(folder, best=2) == [4, 2]
    assert numbers(folder, step=1, best=1) == [2]
    assert numbers(folder, worst=3, best=3) == [3, 1, 4, 2]


def test_samples_are_found_by_their_prompt(folder: Path):
    assert numbers(folder, prompt="2+2") == [2]


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"step": 5}, "no samples of step 5: of 1, 10"), ({"prompt": "zebra"}, "no sample whose prompt has 'zebra'")],
)
def test_what_is_not_there_is_said(folder: Path, asked: dict[str, Any], message: str):
    with pytest.raises(BadInput, match=message):
        numbers(folder, **asked)


def test_a_run_without_samples_says_where_they_would_come_from(tmp_path: Path):
    with pytest.raises(BadInput, match=r"no recipe\.toml"):
        numbers(tmp_path)
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(BadInput, match=r"observe\.samples\.every"):
        numbers(tmp_path)


def printed(folder: Path, *, as_json: bool) -> str:
    console = Console(width=100, record=True, force_terminal=False)
    with console.capture() as capture:
        print_samples(folder, 10, 0, 0, "", as_json, console)
    return capture.get()


def test_the_table_shows_text_reward_and_what_else_is_known(folder: Path):
    page = printed(folder, as_json=False)
    for text in ("5+7=12<eos>", "reward 0.7", "right 0.7", "advantage 0.5", "7 tokens, cut", "versions 2 to 3"):
        assert text in page


def test_json_has_the_same_rows(folder: Path):
    first, second = json.loads(printed(folder, as_json=True))
    assert (first["step"], first["reward"], second["response"], second["versions"]) == (10, None, "12<eos>", [2, 3])


def test_control_characters_of_a_text_are_shown_and_not_obeyed():
    assert visible("a\x1b[2Jb\r\u202ec\n\td") == "a␛[2Jb␍\\u202ec\n\td"
