"""The benchmark of learning: which runs it makes, what it reports, and that it continues after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncflow.bench.learning import QUICK, RECIPES, measure
from asyncflow.bench.learning_table import Case, LearningResult, cases, measured
from asyncflow.bench.report import Mean
from asyncflow.cli.main import app
from asyncflow.dataflow.algorithms import ALGORITHMS
from asyncflow.recipe.config import BadInput

RECIPES_HERE = Path(__file__).parents[2] / RECIPES


def result(case: Case, after: float, error: str = "") -> LearningResult:
    return LearningResult(
        case=case,
        recipe="",
        error=error,
        before=0.3,
        after=after,
        reward_first=0.25,
        reward_last=0.5,
        staleness_mean=3.5,
        staleness_max=4,
        steps=60,
        samples=15_360,
        seconds=30.0,
        correction="tis",
    )


# --- which runs


def test_all_of_one_seed_run_before_the_next():
    assert cases(["grpo", "rloo"], 2, []) == [
        Case("grpo", 0),
        Case("rloo", 0),
        Case("grpo", 1),
        Case("rloo", 1),
    ]


def test_staleness_is_compared_for_two_algorithms_and_uncorrected_at_the_largest_bound():
    names = [case.name for case in cases(["rloo", "ppo"], 1, [0, 4])]
    assert names == [
        "rloo-seed0",
        "ppo-seed0",
        "ppo-staleness0-seed0",
        "ppo-staleness4-seed0",
        "ppo-staleness4-uncorrected-seed0",
    ]


def test_a_case_says_what_it_changes_in_the_recipe():
    assert Case("ppo", 2).overrides == ["seed=2"]
    assert Case("ppo", 2, 4, corrected=False).overrides == ["seed=2", "staleness=4", "loss.correction=none"]


# --- what is reported


def test_a_mean_over_seeds_has_the_sample_deviation():
    two = Mean.of([0.5, 0.7])
    assert (two.value, two.spread) == pytest.approx((0.6, 0.02**0.5))
    assert Mean.of([0.5]) == Mean(0.5, 0.0)


def test_recipes_and_staleness_are_two_tables():
    found = measured(
        [
            result(Case("grpo", 0), 0.5),
            result(Case("grpo", 1), 0.7),
            result(Case("grpo", 0, 4), 0.6),
        ]
    ).lines
    assert found == [
        "| recipe | seeds | held-out before | held-out after | reward first | reward last | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| grpo | 2 | 0.300 | 0.600 ± 0.141 | 0.250 ± 0.000 | 0.500 ± 0.000 | 30 |",
        "",
        "| recipe | bound | correction | staleness mean, max | seeds | held-out after |",
        "| --- | --- | --- | --- | --- | --- |",
        "| grpo | 4 | tis | 3.50, 4 | 1 | 0.600 ± 0.000 |",
    ]


def test_a_run_that_failed_is_named_and_not_averaged():
    found = measured([result(Case("grpo", 0), 0.5), result(Case("grpo", 1), 0.0, "it died")]).lines
    assert "| grpo | 1 | 0.300 | 0.500 ± 0.000 |" in found[2]
    assert found[-1] == "did not finish: grpo-seed1: it died"
    assert measured([result(Case("grpo", 1), 0.0, "it died")]).lines == ["did not finish: grpo-seed1: it died"]


def test_a_programs_row_has_the_score_before_as_its_peer():
    score, *_, speed = measured([result(Case("grpo", 0, 4), 0.6)]).rows
    assert (score.name, score.value, score.peer, score.ratio, score.bound) == (
        "grpo-staleness4: held-out score",
        0.6,
        0.3,
        2.0,
        1.0,
    )
    assert (speed.value, speed.unit) == (512.0, "samples/s")


# --- real runs


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """The recipes of one algorithm, whose policy has hardly been trained."""
    folder = tmp_path / "arithmetic"
    folder.mkdir()
    for name in ("sft", "rloo"):
        text = (RECIPES_HERE / f"{name}.toml").read_text().replace("runs/demo", str(tmp_path))
        (folder / f"{name}.toml").write_text(text.replace("steps = 1000", "steps = 2"))
    return folder


async def test_a_finished_case_is_not_run_again_and_an_unfinished_one_is(recipes: Path, tmp_path: Path):
    async def go() -> list[LearningResult]:
        return await measure(["rloo"], 1, [], folder=tmp_path, recipes=recipes, overrides=QUICK)

    (first,) = await go()
    assert (first.error, first.steps, first.samples, first.case) == ("", 2, 64, Case("rloo", 0))
    assert first.seconds > 0
    assert await go() == [first]  # with the seconds of the first time
    (tmp_path / "results" / "rloo-seed0.json").unlink()  # as if it had been interrupted: its run folder is there
    (again,) = await go()
    assert (again.error, again.steps) == ("", 2)
    assert again.seconds != first.seconds


async def test_an_unknown_recipe_is_refused_before_anything_runs(tmp_path: Path):
    with pytest.raises(BadInput, match="did you mean 'grpo'"):
        await measure(["grppo"], 1, [], folder=tmp_path, recipes=RECIPES_HERE, overrides=QUICK)


def test_the_command_refuses_a_bound_that_is_no_number():
    error = CliRunner().invoke(app, ["bench", "learning", "--staleness", "0,two"]).exception
    assert isinstance(error, BadInput)
    assert str(error) == "--staleness '0,two': 'two' is not a number of versions; write e.g. 0,2,4"


def test_every_algorithm_is_among_the_recipes():
    assert {path.stem for path in RECIPES_HERE.glob("*.toml")} >= ALGORITHMS.keys()
