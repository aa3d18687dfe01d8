"""The held-out sets of a recipe: one path, or a table of sets with their own settings; contradictions are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncflow.recipe.checks import check
from asyncflow.recipe.config import BadInput, recipe_text, to_recipe
from asyncflow.recipe.evaluations import evaluators_of, is_evaluator, sets_of
from protocols.roles import Sampling
from tests.asyncflow.conftest import MakeRecipe


def test_one_path_is_one_unnamed_set_answered_greedily(make_recipe: MakeRecipe):
    recipe = make_recipe(generation={"temperature": 0.7, "top_p": 0.9, "min_tokens": 1, "stop": ["="]})
    (wanted,) = sets_of(recipe)
    assert (wanted.name, wanted.scorers, wanted.samples) == ("", {"exact_match": "evaluator"}, 1)
    assert wanted.sampling == Sampling(max_tokens=6, temperature=0.0, min_tokens=1, stop=("=",))
    assert wanted.curves("exact_match") == ["exact_match"]


def test_each_set_may_differ_from_the_recipe_s_evaluation(make_recipe: MakeRecipe, data: Path):
    sets = {
        "plain": str(data / "heldout.jsonl"),
        "sampled": {
            "path": str(data / "heldout.jsonl"),
            "metric": ["prefix_match", "reward"],
            "samples": 4,
            "temperature": 0.8,
            "top_p": 0.9,
            "pass_at": [4, 1],
            "limit": 3,
        },
    }
    recipe = make_recipe(data={"eval": sets}, evaluation={"limit": 5})
    plain, sampled = sets_of(recipe)
    assert (plain.scorers, plain.limit, plain.pass_at) == ({"exact_match": "evaluator"}, 5, [])
    assert sampled.scorers == {"prefix_match": "evaluator2", "reward": "reward"}
    assert sampled.sampling == Sampling(max_tokens=6, temperature=0.8, top_p=0.9)
    assert (sampled.samples, sampled.limit, sampled.pass_at) == (4, 3, [1, 4])
    assert all(is_evaluator(service) for service in evaluators_of(recipe).values())
    assert not is_evaluator("reward")


def test_several_answers_make_pass_at_as_many_by_default(make_recipe: MakeRecipe):
    (wanted,) = sets_of(make_recipe(evaluation={"samples": 8, "temperature": 1.0}))
    assert wanted.curves("exact_match") == ["exact_match", "exact_match.pass@8"]


def test_a_recipe_with_sets_is_written_and_read_again(table: dict[str, Any], data: Path):
    import tomllib

    sets = {"a": "a.jsonl", "b": {"path": "b.jsonl", "samples": 2, "temperature": 1.0}}
    recipe = to_recipe({**table, "data": {**table["data"], "eval": sets}})
    assert to_recipe(tomllib.loads(recipe_text(recipe))) == recipe


def test_rows_of_several_sets_and_answers_have_ids_of_their_own(make_recipe: MakeRecipe, data: Path):
    path = str(data / "heldout.jsonl")
    sets = {"a": path, "b": {"path": path, "samples": 3, "temperature": 1.0}}
    checked = check(make_recipe(data={"eval": sets}))
    (a, source_a), (b, source_b) = checked.heldout
    rows = [a.rows(source_a, 0, 0), b.rows(source_b, 0, len(source_a))]
    ids = [sample for batch in rows for sample in batch.sample_ids.tolist()]
    assert len(set(ids)) == len(ids) == 10 + 30
    assert [rows[1].references.text(3 * i) for i in range(10)] == [rows[0].references.text(i) for i in range(10)]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"samples": 4}, "evaluation.samples = 4: at temperature 0 an answer is greedy"),
        ({"top_p": 0.9}, "evaluation.top_p = 0.9: at temperature 0"),
        ({"top_k": 5}, "evaluation.top_k = 5: at temperature 0"),
        ({"samples": 4, "temperature": 1.0, "pass_at": [8]}, "evaluation.pass_at = 8: of 4 answers"),
        ({"metric": []}, r"evaluation.metric = \[\]: want at least one"),
        ({"metric": ["exact_match", "exact_match"]}, "evaluation.metric"),
    ],
)
def test_settings_that_contradict_each_other(make_recipe: MakeRecipe, evaluation: dict[str, Any], message: str):
    with pytest.raises(BadInput, match=message):
        check(make_recipe(evaluation=evaluation))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a.b": "x"}, "the set's name 'a.b'"),
        ({"a": {"path": "x", "sample": 2}}, "unknown key data.eval.a.sample, did you mean 'samples'"),
        ({"a": {"path": "x", "samples": 0}}, "data.eval.a.samples = 0: want 1 or more"),
        ({"a": {"path": "x", "top_p": 0.0}}, "data.eval.a.top_p = 0.0: want more than 0, at most 1"),
        ({"a": {"path": "x", "top_p": 0.5}}, "data.eval.a.top_p = 0.5: at temperature 0"),
    ],
)
def test_a_set_that_can_not_be_evaluated(make_recipe: MakeRecipe, sets: dict[str, Any], message: str):
    with pytest.raises(BadInput, match=message):
        sets_of(make_recipe(data={"eval": sets}))


def test_vllm_s_temperatures_bound_the_evaluation_too(make_recipe: MakeRecipe):
    recipe = make_recipe(generation={"engine": "vllm"}, evaluation={"temperature": 2.5})
    with pytest.raises(BadInput, match=r"evaluation\.temperature = 2\.5: vLLM samples at 0\.01 to 2"):
        sets_of(recipe)
