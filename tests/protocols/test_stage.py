"""Stages: a method's annotations are its contract, and an incomplete contract is refused with the method's name."""

from __future__ import annotations

import pytest

from protocols.data.columns import Batch
from protocols.data.messages import Costs, Experience, LogProbs, Metrics, Prompts, Rollouts, Scores, Values
from protocols.layout.transfer import protocols
from protocols.roles import ROLES, Policy, Sampling
from protocols.stage import Measured, Partial, contract_of, signature_of, stage, stages_of


class Scorer:
    """A role with one stage of each form."""

    @stage(protocol="DP_PROTO")
    def join(self, rollouts: Rollouts, scores: Scores) -> Costs: ...  # type: ignore[empty-body]

    @stage(protocol="DP_PROTO")
    def partial(self, rollouts: Rollouts, *, strict: bool = True) -> Scores | Partial[Scores]: ...  # type: ignore

    @stage(protocol="DP_PROTO")
    def measured(self, rollouts: Rollouts) -> Measured[Scores]: ...  # type: ignore[empty-body]

    @stage(protocol="METRIC", whole_groups=True, balance="tokens")
    def learn(self, experience: Experience) -> Metrics: ...  # type: ignore[empty-body]

    def describe(self) -> str:
        """A method that is no stage."""
        return "a scorer"


class Lenient(Scorer):
    """An implementation that overrides a stage without the decorator."""

    def partial(self, rollouts: Rollouts, *, strict: bool = False) -> Scores | Partial[Scores]: ...  # type: ignore


def test_a_contract_is_read_from_the_annotations():
    contract = contract_of(Scorer, "join")
    assert contract.method == "join"
    assert contract.protocol == "DP_PROTO"
    assert contract.consumes == (Rollouts, Scores)
    assert contract.produces is Costs
    assert not contract.is_sink


@pytest.mark.parametrize("method", ["partial", "measured"])
def test_what_stands_around_a_message_does_not_hide_it(method: str):
    contract = contract_of(Scorer, method)
    assert contract.consumes == (Rollouts,)
    assert contract.produces is Scores


def test_a_stage_that_produces_metrics_is_a_sink():
    assert contract_of(Scorer, "learn").is_sink


def test_a_stage_cuts_plain_rows_unless_it_asks_for_more():
    assert (contract_of(Scorer, "join").whole_groups, contract_of(Scorer, "join").balance) == (False, "rows")
    assert (contract_of(Scorer, "learn").whole_groups, contract_of(Scorer, "learn").balance) == (True, "tokens")


def test_a_balance_that_is_none_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match="stage balance 'bytes': know rows, tokens"):
        stage(protocol="DP_PROTO", balance="bytes")  # type: ignore[arg-type]


def test_a_role_lists_its_stages():
    assert stages_of(Scorer) == ["join", "learn", "measured", "partial"]


@pytest.mark.parametrize("method", ["describe", "guess"])
def test_a_stage_that_is_not_there_is_answered_with_those_that_are(method: str):
    with pytest.raises(LookupError, match=f"Scorer has no stage '{method}'; it has join, learn, measured, partial"):
        contract_of(Scorer, method)


def test_contracts_belong_to_roles_not_to_implementations():
    with pytest.raises(LookupError, match="Lenient has no stage 'partial'"):
        contract_of(Lenient, "partial")


def untyped(rollouts) -> Scores: ...  # type: ignore[empty-body]
def mistyped(rollouts: Rollouts) -> dict[str, float]: ...  # type: ignore[empty-body]
def undecided(rollouts: Rollouts) -> Scores | Costs: ...  # type: ignore[empty-body]
def silent(rollouts: Rollouts): ...


@pytest.mark.parametrize(
    ("function", "parameter"),
    [(untyped, "rollouts"), (mistyped, "return"), (undecided, "return"), (silent, "return")],
    ids=lambda case: getattr(case, "__name__", case),
)
def test_a_signature_of_other_things_than_messages_is_refused(function, parameter: str):
    with pytest.raises(TypeError, match=f"{function.__name__}: annotate '{parameter}' with a message type"):
        signature_of(function)


# --- the built-in roles

CONTRACTS: list[tuple[str, str, tuple[type[Batch], ...], type]] = [
    ("policy", "generate", (Prompts,), Rollouts),
    ("policy", "log_probs", (Rollouts,), LogProbs),
    ("policy", "update", (Experience,), Metrics),
    ("critic", "values", (Rollouts,), Values),
    ("critic", "update", (Experience,), Metrics),
    ("reference", "log_probs", (Rollouts,), LogProbs),
    ("reward", "score", (Rollouts,), Scores),
    ("cost", "score", (Rollouts,), Costs),
]


@pytest.mark.parametrize(("role", "method", "consumes", "produces"), CONTRACTS)
def test_what_the_roles_say(role: str, method: str, consumes: tuple[type[Batch], ...], produces: type):
    contract = contract_of(ROLES[role], method)
    assert contract.consumes == consumes
    assert contract.produces is produces
    assert contract.protocol in protocols()


def test_a_role_is_a_contract_only():
    with pytest.raises(TypeError, match="abstract"):
        Policy()  # type: ignore[abstract]
    assert Sampling().temperature == 1.0
