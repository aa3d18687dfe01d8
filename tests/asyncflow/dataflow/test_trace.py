"""Tracing turns an algorithm into a graph; what could not run is an error that names the place and the values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

import asyncflow
from asyncflow.dataflow.algorithms import ALGORITHMS
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.graph import SOURCE, Dataflow, DataflowError, Filter
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.trace import Algorithm, Flow, Join, Symbol, algorithm, defaults_of, trace
from protocols.data.messages import Costs, Experience, LogProbs, Metrics, Prompts, Rollouts, Scores, Values
from protocols.roles import GREEDY, ROLES, Policy, Reward
from protocols.stage import Stateful, stage
from workers.advantages.gae import gae

ROOT = Path(__file__).parents[3]


def reinforce(rollouts: Rollouts, scores: Scores, *, scale: float = 2.0) -> Experience:
    """A batch function with two inputs; tracing never calls it."""
    raise NotImplementedError


class Seen(msgspec.Struct, frozen=True):
    """The state of a batch function."""

    batches: int = 0


def counts(
    rollouts: Rollouts, scores: Scores, *, state: Seen | None = None, scale: float = 2.0
) -> Stateful[Experience, Seen]:
    """A stateful batch function."""
    raise NotImplementedError


def error_of(function: Algorithm, roles: Mapping[str, type] | None = None) -> str:
    with pytest.raises(DataflowError) as refused:
        trace(function, roles)
    return str(refused.value)


# --- the graph of an algorithm


@pytest.fixture(scope="module")
def ppo_flow() -> Dataflow:
    return trace(ppo)


def test_ppo_is_seven_stages_in_the_order_of_its_lines(ppo_flow: Dataflow):
    assert {s.name: (s.service, s.inputs, s.grain) for s in ppo_flow.stages} == {
        "policy.generate#1": ("policy", (SOURCE,), "sample"),
        "reference.log_probs#1": ("reference", ("policy.generate#1",), "sample"),
        "critic.values#1": ("critic", ("policy.generate#1",), "sample"),
        "reward.score#1": ("reward", ("policy.generate#1",), "sample"),
        "gae#1": (
            "advantage",
            ("policy.generate#1", "reference.log_probs#1", "critic.values#1", "reward.score#1"),
            "batch",
        ),
        "critic.update#1": ("critic", ("gae#1",), "batch"),
        "policy.update#1": ("policy", ("gae#1",), "batch"),
    }
    assert ppo_flow.services == ["policy", "reference", "critic", "reward", "advantage"]


def test_channels_are_typed_and_carry_the_protocol_of_their_destination(ppo_flow: Dataflow):
    edges = {c.edge: (c.source, c.message, c.grain, c.protocol) for c in ppo_flow.channels}
    assert len(edges) == 1 + 3 + 4 + 2
    assert edges["policy.generate#1.0"] == (SOURCE, Prompts, "sample", "3D_ALL_MICRO_DP")
    assert edges["critic.values#1.0"] == ("policy.generate#1", Rollouts, "sample", "3D_PROTO")
    assert edges["gae#1.2"] == ("critic.values#1", Values, "sample", "RANK_ZERO")
    assert edges["policy.update#1.0"] == ("gae#1", Experience, "batch", "METRIC")


def test_a_graph_answers_who_feeds_whom(ppo_flow: Dataflow):
    assert [c.destination for c in ppo_flow.consumers("gae#1")] == ["critic.update#1", "policy.update#1"]
    assert [c.source for c in ppo_flow.consumers(SOURCE)] == [SOURCE]
    assert [c.message for c in ppo_flow.inputs_of("gae#1")] == [Rollouts, LogProbs, Values, Scores]
    assert [s.name for s in ppo_flow.sinks] == ["critic.update#1", "policy.update#1"]
    assert [s.name for s in ppo_flow.stages_of("critic")] == ["critic.values#1", "critic.update#1"]
    assert ppo_flow.batch_stage.function is gae
    with pytest.raises(KeyError):
        ppo_flow.stage("policy.generate#2")


def test_the_drawing_has_a_line_a_stage(ppo_flow: Dataflow):
    lines = ppo_flow.draw().splitlines()
    assert [line.split()[0] for line in lines] == [s.name for s in ppo_flow.stages]
    assert "<- policy.generate#1 -> Values   [sample, 3D_PROTO]" in lines[2]
    assert lines[-1].endswith("<- gae#1   [batch, METRIC]")


def test_a_service_that_is_called_twice_is_two_stages():
    def twice(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        again = flow.policy.generate(flow.prompts)
        flow.policy.update(flow.join(rollouts, flow.reward.score(again)).apply(reinforce))

    assert [s.name for s in trace(twice).stages_of("policy")] == [
        "policy.generate#1",
        "policy.generate#2",
        "policy.update#1",
    ]


def with_baseline(rollouts: Rollouts, scores: Scores, baseline: Scores) -> Experience:
    raise NotImplementedError


def test_a_greedy_call_and_what_follows_from_it_have_one_row_a_prompt():
    def remax(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        greedy = flow.policy.generate(flow.prompts, sampling=GREEDY)
        joined = flow.join(rollouts, flow.reward.score(rollouts), flow.reward.score(greedy), on="prompt")
        flow.policy.update(joined.apply(with_baseline))

    dataflow = trace(remax)
    assert [(s.name, s.grain, s.greedy) for s in dataflow.stages][:4] == [
        ("policy.generate#1", "sample", False),
        ("policy.generate#2", "prompt", True),
        ("reward.score#1", "sample", False),
        ("reward.score#2", "prompt", False),
    ]
    assert [c.grain for c in dataflow.inputs_of("with_baseline#1")] == ["sample", "sample", "prompt"]
    assert [c.grain for c in dataflow.consumers(SOURCE)] == ["sample", "prompt"]


def test_the_numbers_of_a_batch_function_are_its_keyword_only_parameters():
    assert defaults_of(reinforce) == {"scale": 2.0}


class Scorer(Reward):
    """A user's role."""

    @stage(protocol="DP_PROTO")
    def rate(self, rollouts: Rollouts) -> Scores:
        raise NotImplementedError


def test_roles_may_be_a_users_own():
    def scored(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        flow.policy.update(flow.join(rollouts, flow.scorer.rate(rollouts)).apply(reinforce))

    dataflow = asyncflow.trace(scored, roles={"policy": Policy, "scorer": Scorer})
    assert dataflow.stage("scorer.rate#1").protocol == "DP_PROTO"
    assert error_of(scored) == ("unknown role 'scorer'; roles: policy, critic, cost_critic, reference, reward, cost")


# --- refusals


def test_an_unknown_role_is_told_the_nearest():
    def wrong(flow: Flow) -> None:
        flow.polici.generate(flow.prompts)

    assert error_of(wrong).startswith("unknown role 'polici', did you mean 'policy'?; roles: policy, critic")


def test_an_unknown_stage_is_told_the_stages_of_its_role():
    def wrong(flow: Flow) -> None:
        flow.critic.score(flow.prompts)

    assert error_of(wrong) == "flow.critic.score: Critic has no stage 'score'; it has update, values"


def test_a_message_of_the_wrong_type_names_both():
    def wrong(flow: Flow) -> None:
        flow.reward.score(flow.prompts)

    assert error_of(wrong) == "reward.score takes (Rollouts), got (Prompts of prompts)"


def test_a_stage_without_its_input_is_refused():
    def wrong(flow: Flow) -> None:
        flow.reward.score()

    assert error_of(wrong) == "reward.score takes (Rollouts), got ()"


@pytest.mark.parametrize("value", [3, None, "rollouts"])
def test_only_outputs_of_stages_flow(value: Any):
    def into_stage(flow: Flow) -> None:
        flow.reward.score(value)

    def into_join(flow: Flow) -> None:
        flow.join(flow.policy.generate(flow.prompts), value)

    assert error_of(into_stage) == f"reward.score: takes outputs of stages, got {value!r}"
    assert error_of(into_join) == f"join: takes outputs of stages, got {value!r}"


def test_an_output_that_nobody_reads_is_refused():
    def wrong(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        flow.critic.values(rollouts)
        flow.policy.update(flow.join(rollouts, flow.reward.score(rollouts)).apply(reinforce))

    assert error_of(wrong) == "wrong: nobody reads the Values of critic.values#1: its rows would be held for ever"


@pytest.mark.parametrize("trains_critic", [False, True])
def test_an_algorithm_trains_the_policy(trains_critic: bool):
    def wrong(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        experience = flow.join(rollouts, flow.reward.score(rollouts)).apply(reinforce)
        if trains_critic:
            flow.critic.update(experience)

    assert error_of(wrong) == "wrong: nothing calls flow.policy.update, so nothing would be trained"


def test_an_empty_algorithm_is_refused():
    assert "nothing calls flow.policy.update" in error_of(lambda flow: None)


def test_rows_are_not_a_batch():
    def wrong(flow: Flow) -> None:
        flow.policy.update(flow.policy.generate(flow.prompts))

    assert error_of(wrong) == "policy.update takes (Experience), got (Rollouts of policy.generate#1)"


class RowTrainer(Policy):
    """A role whose update would take rows as they arrive."""

    @stage(protocol="METRIC")
    def update(self, experience: Rollouts) -> Metrics:  # type: ignore[override]
        raise NotImplementedError


class PromptTrainer(Policy):
    """A role whose update would take prompts, which were never generated."""

    @stage(protocol="METRIC")
    def update(self, experience: Prompts) -> Metrics:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize(("role", "source"), [(RowTrainer, "policy.generate#1"), (PromptTrainer, "prompts")])
def test_a_sink_takes_a_closed_batch(role: type, source: str):
    def wrong(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        joined = flow.join(rollouts, flow.reward.score(rollouts)).apply(reinforce)
        flow.critic.update(joined)
        flow.policy.update(rollouts if role is RowTrainer else flow.prompts)

    message = error_of(wrong, ROLES | {"policy": role})
    assert message == f"wrong: policy.update#1 trains on a closed batch, but {source} gives single rows"


def test_there_is_one_batch():
    def none(flow: Flow) -> None:
        flow.policy.update(Symbol("elsewhere#1", Experience, "batch"))

    def two(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        scores = flow.reward.score(rollouts)
        for _ in range(2):
            flow.policy.update(flow.join(rollouts, scores).apply(reinforce))

    assert error_of(none) == "none: wants exactly one join(...).apply(...) that forms the batch, has []"
    assert error_of(two).endswith("forms the batch, has ['reinforce#1', 'reinforce#2']")


def test_symbols_of_another_algorithm_are_refused():
    kept: list[Symbol] = []

    def first(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        flow.policy.generate(flow.prompts)
        kept.append(flow.policy.generate(flow.prompts))
        flow.policy.update(flow.join(rollouts, flow.reward.score(rollouts)).apply(reinforce))

    def second(flow: Flow) -> None:
        flow.policy.update(flow.join(kept[0], flow.reward.score(kept[0])).apply(reinforce))

    error_of(first)
    assert error_of(second) == "second: reward.score#1 reads policy.generate#3, which is no stage of this algorithm"


@pytest.mark.parametrize(
    ("joined", "message"),
    [
        (lambda flow: flow.join(), "join of []: no input has a row per sample"),
        (lambda flow: flow.join(flow.prompts), "join of Prompts of prompts: prompts go to stages that generate"),
        (
            lambda flow: flow.join(flow.policy.generate(flow.prompts, sampling=GREEDY), on="prompt"),
            "join of [Rollouts of policy.generate#1]: no input has a row per sample",
        ),
        (
            lambda flow: flow.join(flow.policy.generate(flow.prompts), on="prompt"),
            "join of [Rollouts of policy.generate#1] on='prompt': no input has a row per prompt, so it is on='sample'",
        ),
        (
            lambda flow: flow.join(flow.policy.generate(flow.prompts), on="batch"),
            "join on='batch': know sample, prompt",
        ),
    ],
)
def test_a_join_whose_rows_could_never_meet_is_refused(joined: Callable[[Flow], Any], message: str):
    assert error_of(lambda flow: joined(flow) and None) == message


def test_rows_per_prompt_are_joined_on_the_prompt():
    def on_sample(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        baseline = flow.reward.score(flow.policy.generate(flow.prompts, sampling=GREEDY))
        flow.policy.update(flow.join(rollouts, baseline).apply(reinforce))

    assert error_of(on_sample) == (
        "join of Rollouts of policy.generate#1 per sample, Scores of reward.score#1 per prompt: "
        "on='prompt' gives a prompt's one row to each of its samples"
    )


def test_a_closed_batch_is_not_joined_again():
    def twice(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        experience = flow.join(rollouts, flow.reward.score(rollouts)).apply(reinforce)
        flow.join(rollouts, experience)

    assert error_of(twice) == "join of Experience of reinforce#1: a closed batch is not joined again"


class Auditor(Reward):
    """A user's role that joins rows of two other stages, and has a stage for a closed batch."""

    @stage(protocol="DP_PROTO")
    def compare(self, rollouts: Rollouts, scores: Scores) -> Scores:
        raise NotImplementedError

    @stage(protocol="DP_PROTO")
    def audit(self, experience: Experience) -> Scores:
        raise NotImplementedError

    @stage(protocol="METRIC")
    def heed(self, scores: Scores) -> Metrics:
        raise NotImplementedError


def test_a_stage_takes_rows_of_one_grain():
    def mixed(flow: Flow) -> None:
        greedy = flow.policy.generate(flow.prompts, sampling=GREEDY)
        flow.auditor.compare(flow.policy.generate(flow.prompts), flow.reward.score(greedy))

    assert error_of(mixed, ROLES | {"auditor": Auditor}) == (
        "auditor.compare takes rows of one grain, "
        "got Rollouts of policy.generate#2 per sample, Scores of reward.score#1 per prompt"
    )


def test_a_closed_batch_goes_to_those_who_train():
    def audited(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        experience = flow.join(rollouts, flow.auditor.compare(rollouts, flow.reward.score(rollouts))).apply(reinforce)
        flow.policy.update(experience)
        flow.auditor.heed(flow.auditor.audit(experience))

    assert error_of(audited, ROLES | {"auditor": Auditor}) == (
        "audited: auditor.audit#1 takes single rows, but reinforce#1 gives a closed batch"
    )


def test_sampling_is_for_stages_that_draw():
    def wrong(flow: Flow) -> None:
        flow.reward.score(flow.policy.generate(flow.prompts), sampling=GREEDY)

    assert error_of(wrong) == "reward.score: sampling is for stages that generate from flow.prompts"


def bare(rollouts, scores):  # type: ignore[no-untyped-def]
    raise NotImplementedError


def passes_on(rollouts: Rollouts, scores: Scores) -> Scores:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bare, "bare: annotate 'rollouts' with a message type, got None"),
        (passes_on, "passes_on: returns Scores, a batch function returns Experience"),
        (gae, "gae takes (Rollouts, LogProbs, Values, Scores), got (Rollouts of policy.generate#1, Scores of reward"),
    ],
)
def test_apply_takes_a_function_of_the_joined_messages(function: Any, message: str):
    def wrong(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        flow.policy.update(flow.join(rollouts, flow.reward.score(rollouts)).apply(function))

    assert error_of(wrong).startswith(message)


def updating(batch_of: Callable[[Join], Symbol]) -> Algorithm:
    """An algorithm that trains the policy on a function of rollouts and their scores."""

    def own(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        flow.policy.update(batch_of(flow.join(rollouts, flow.reward.score(rollouts))))

    return own


# --- state and filter of the batch


def test_a_batch_function_that_carries_a_state_says_its_type():
    dataflow = trace(updating(lambda rows: rows.apply(counts)))
    assert dataflow.batch_stage.state is Seen
    assert defaults_of(counts) == {"scale": 2.0}, "the state is no number of the recipe"


def takes_only(rollouts: Rollouts, scores: Scores, *, state: Seen | None = None) -> Experience:
    raise NotImplementedError


def returns_only(rollouts: Rollouts, scores: Scores) -> Stateful[Experience, Seen]:
    raise NotImplementedError


def never_begins(rollouts: Rollouts, scores: Scores, *, state: Seen) -> Stateful[Experience, Seen]:
    raise NotImplementedError


@pytest.mark.parametrize("function", [takes_only, returns_only, never_begins])
def test_a_state_is_taken_and_returned_and_none_at_first(function: Any):
    message = error_of(updating(lambda rows: rows.apply(function)))
    assert message.startswith(
        f"{function.__name__}: a stateful batch function takes a keyword `state: State | None` and returns "
        "Stateful[Experience, State]; it takes"
    )


def by_scores(scores: Scores) -> npt.NDArray[np.bool_]:
    raise NotImplementedError


def by_both(scores: Scores, rollouts: Rollouts) -> npt.NDArray[np.bool_]:
    raise NotImplementedError


@pytest.mark.parametrize(("function", "inputs"), [(by_scores, (1,)), (by_both, (1, 0))])
def test_a_filter_finds_what_it_takes_by_type(function: Any, inputs: tuple[int, ...]):
    dataflow = trace(updating(lambda rows: rows.keep(function).apply(reinforce)))
    assert dataflow.batch_stage.filter == Filter(function, inputs)
    assert dataflow.draw().splitlines()[2].endswith(f"[batch, RANK_ZERO, where {function.__name__}]")


def by_costs(costs: Costs) -> npt.NDArray[np.bool_]:
    raise NotImplementedError


def by_nothing() -> npt.NDArray[np.bool_]:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            by_costs,
            "by_costs: costs is Costs, of which the join has 0 with a row per sample, want one; it has Rollouts",
        ),
        (bare, "bare: rollouts is None, of which the join has 0"),
        (by_nothing, "by_nothing: has no parameter, so it can't tell one prompt from another"),
    ],
)
def test_a_filter_takes_what_the_join_has(function: Any, message: str):
    assert error_of(updating(lambda rows: rows.keep(function).apply(reinforce))).startswith(message)


def test_a_filter_that_could_mean_two_inputs_is_refused():
    def wrong(flow: Flow) -> None:
        rollouts = flow.policy.generate(flow.prompts)
        scores = [flow.reward.score(rollouts) for _ in range(2)]
        flow.policy.update(flow.join(rollouts, *scores).keep(by_scores).apply(with_baseline))

    assert "by_scores: scores is Scores, of which the join has 2 with a row per sample" in error_of(wrong)


def test_a_join_is_filtered_once():
    wrong = updating(lambda rows: rows.keep(by_scores).keep(by_both).apply(reinforce))
    assert error_of(wrong) == "by_both: the join is already filtered by by_scores"


def test_an_algorithm_takes_the_flow_and_nothing_else():
    with pytest.raises(DataflowError, match="two: an algorithm takes one argument, the flow"):

        @algorithm  # type: ignore[arg-type]
        def two(flow: Flow, scale: float) -> None:
            raise NotImplementedError


# --- algorithms by name


def test_a_recipe_names_an_algorithm_or_a_function():
    assert algorithm_named("ppo") is ALGORITHMS["ppo"] is ppo
    assert algorithm_named("asyncflow.dataflow.algorithms.ppo:ppo") is ppo


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pppo", "algorithm 'pppo', did you mean 'ppo'?; known: ppo"),
        ("zzz", "algorithm 'zzz'; known: ppo"),
        ("no.such:f", "algorithm 'no.such:f': importing no.such raised ModuleNotFoundError: No module named 'no'"),
        (
            "asyncflow.dataflow.graph:nothing",
            "asyncflow.dataflow.graph has no function 'nothing' marked with @algorithm",
        ),
        ("asyncflow.dataflow.graph:check", "asyncflow.dataflow.graph has no function 'check' marked with @algorithm"),
        (":f", f"algorithm ':f'; known: {', '.join(ALGORITHMS)}, or package.module:function"),
        (".graph:check", "algorithm '.graph:check'; known: ppo"),
    ],
)
def test_a_name_that_means_nothing_says_what_is_known(name: str, message: str):
    with pytest.raises(DataflowError) as refused:
        algorithm_named(name)
    assert message in str(refused.value)


def test_tracing_imports_no_torch():
    """Run in a new process, because this one may have imported torch already."""
    program = (
        "import sys, asyncflow; from asyncflow.dataflow.registry import algorithm_named;"
        "assert len(asyncflow.trace(algorithm_named('ppo')).stages) == 7;"
        "print(*{'torch', 'ray', 'vllm', 'transformers'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr
