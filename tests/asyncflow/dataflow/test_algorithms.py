"""The built-in algorithms: the edges of each dataflow, and the defaults that each declares."""

from __future__ import annotations

import ast
import inspect
import textwrap
import tomllib
from typing import Any

import pytest

from asyncflow.dataflow.algorithms import ALGORITHMS
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.graph import Dataflow, DataflowError, Filter
from asyncflow.dataflow.trace import Declaration, Flow, algorithm, declaration_of, trace
from asyncflow.recipe.config import BadInput, recipe_text, to_recipe
from workers.advantages.dapo import trainable_groups
from workers.advantages.gae import gae
from workers.advantages.safe_rlhf import Multiplier
from workers.settings import Loss

WITH_REFERENCE = {"ppo", "safe_rlhf", "remax", "grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"}


@algorithm(loss=Loss(policy="cispo", clip_high=4.0), advantage={"gamma": 0.9})
def own(flow: Flow) -> None:
    """A user's algorithm: PPO's dataflow with other defaults."""
    ppo(flow)


def stages_of(name: str) -> set[str]:
    return {stage.name for stage in trace(ALGORITHMS[name]).stages}


def recipe(**table: Any) -> dict[str, Any]:
    sizes = {"name": "x", "steps": 1, "prompts_per_step": 1, "data": {"train": "x"}, "models": {}}
    return sizes | table


# --- the dataflows, compared with PPO's


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_named_as_its_function_and_traces(name: str):
    dataflow = trace(ALGORITHMS[name])
    assert isinstance(dataflow, Dataflow)
    assert dataflow.name == name
    assert ("reference.log_probs#1" in stages_of(name)) == (name in WITH_REFERENCE)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_fifteen_lines_of_dataflow_at_most(name: str):
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(ALGORITHMS[name]))).body
    assert isinstance(function, ast.FunctionDef)
    first, *rest = function.body
    assert ast.get_docstring(function), "the first statement is its docstring"
    assert rest[-1].end_lineno is not None
    assert rest[-1].end_lineno - (first.end_lineno or 0) <= 15


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"ppo", "safe_rlhf"}))
def test_only_ppo_and_what_extends_it_have_a_critic(name: str):
    assert {s for s in stages_of("ppo") if s.startswith("critic")} == {"critic.values#1", "critic.update#1"}
    assert not any(s.startswith("critic") for s in stages_of(name))


def test_safe_rlhf_adds_a_cost_its_critic_and_a_state():
    added = stages_of("safe_rlhf") - stages_of("ppo")
    assert added == {"cost.score#1", "cost_critic.values#1", "cost_critic.update#1", "safe_rlhf#1"}
    assert stages_of("ppo") - stages_of("safe_rlhf") == {"gae#1"}
    assert trace(ALGORITHMS["safe_rlhf"]).batch_stage.state is Multiplier
    assert all(trace(ALGORITHMS[name]).batch_stage.state is None for name in ALGORITHMS.keys() - {"safe_rlhf"})


def test_dapo_keeps_prompts_by_their_scores():
    filters = {name: trace(ALGORITHMS[name]).batch_stage.filter for name in ALGORITHMS}
    assert {name for name, kept in filters.items() if kept is not None} == {"dapo"}
    assert filters["dapo"] == Filter(trainable_groups, (1,))
    assert "[batch, RANK_ZERO, where trainable_groups]" in trace(ALGORITHMS["dapo"]).draw()


def test_remax_adds_a_greedy_response_and_its_score():
    added = stages_of("remax") - stages_of("ppo")
    assert added == {"policy.generate#2", "reward.score#2", "remax#1"}
    dataflow = trace(ALGORITHMS["remax"])
    assert dataflow.stage("policy.generate#2").greedy
    assert dataflow.inputs_of("remax#1")[3].grain == "prompt"


# --- declarations


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ppo", {}),
        ("safe_rlhf", {}),
        ("remax", {}),
        ("grpo", {"dual_clip": 0.0, "kl_coefficient": 0.04, "aggregation": "sequence-mean-token-mean"}),
        ("dr_grpo", {"dual_clip": 0.0, "aggregation": "sequence-mean-fixed-length", "fixed_length": 9}),
        ("rloo", {"aggregation": "sequence-mean-token-sum"}),
        ("reinforce_pp", {}),
        ("reinforce_pp_baseline", {}),
        ("dapo", {"clip_high": 0.28, "dual_clip": 0.0}),
        (
            "gspo",
            {
                "policy": "gspo",
                "clip_low": 3e-4,
                "clip_high": 4e-4,
                "dual_clip": 0.0,
                "aggregation": "sequence-mean-token-mean",
            },
        ),
        ("cispo", {"policy": "cispo", "clip_low": 1.0, "clip_high": 4.0}),
    ],
)
def test_a_silent_recipe_has_the_algorithms_loss_written_out(name: str, changes: dict[str, Any]):
    resolved = to_recipe(recipe(algorithm=name, generation={"max_tokens": 9}))
    assert resolved.loss == Loss(**changes)
    assert Loss(**tomllib.loads(recipe_text(resolved))["loss"]) == resolved.loss


def test_what_a_recipe_says_stands_above_what_its_algorithm_says():
    resolved = to_recipe(recipe(algorithm="grpo", loss={"kl_coefficient": 0.0, "epochs": 2}))
    assert resolved.loss == Loss(dual_clip=0.0, aggregation="sequence-mean-token-mean", epochs=2)
    assert to_recipe(recipe(algorithm="dr_grpo", loss={"fixed_length": 3})).loss.fixed_length == 3


def test_another_algorithm_brings_its_own_defaults():
    table = recipe(algorithm="gspo", loss={"mini_batches": 2})
    assert to_recipe(table).loss.clip_high == 4e-4
    assert to_recipe(table | {"algorithm": "ppo"}).loss == Loss(mini_batches=2)


def test_a_users_algorithm_carries_numbers_of_its_own():
    resolved = to_recipe(recipe(algorithm=f"{__name__}:own", advantage={"gae_lambda": 0.5}))
    assert resolved.loss == Loss(policy="cispo", clip_high=4.0)
    assert resolved.advantage == {"gamma": 0.9, "gae_lambda": 0.5}
    assert trace(own).batch_stage.function is gae


def test_a_marked_function_declares_nothing_else():
    assert declaration_of(ppo) == Declaration()
    assert declaration_of(lambda flow: None) == Declaration()
    assert declaration_of(own).least_samples == 1


def test_a_declaration_of_an_unknown_thing_is_an_error():
    with pytest.raises(TypeError, match="lost"):
        algorithm(lost=Loss())  # type: ignore[call-overload]
    with pytest.raises(DataflowError, match="an algorithm takes one argument"):

        @algorithm(least_samples=2)  # type: ignore[arg-type]
        def two(flow: Flow, other: Flow) -> None: ...


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"algorithm": "grop"}, "recipe: algorithm 'grop', did you mean 'grpo'?; known: ppo"),
        ({"algorithm": 3}, "recipe: Expected `str`, got `int` - at `$.algorithm`"),
        ({"loss": 3}, "recipe: Expected `object`, got `int` - at `$.loss`"),
        ({"advantage": [1]}, "recipe: Expected `object`, got `array` - at `$.advantage`"),
        ({"algorithm": "gspo", "loss": {"clip_hihg": 1}}, "recipe: unknown key loss.clip_hihg, did you mean 'clip_h"),
    ],
)
def test_a_table_that_can_not_be_resolved_is_refused(table: dict[str, Any], message: str):
    with pytest.raises(BadInput) as refused:
        to_recipe(recipe(**table))
    assert str(refused.value).startswith(message)
