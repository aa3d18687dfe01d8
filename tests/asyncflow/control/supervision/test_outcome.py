"""The outcome of a failed run names every cause, and never hides a violated invariant behind another one."""

from __future__ import annotations

from asyncflow.control.store.ledger import LedgerError
from asyncflow.control.supervision.outcome import RunFailed, outcome_of
from asyncflow.services.channels.endpoint import ServiceError, causes


def group(*errors: Exception) -> ExceptionGroup:
    return ExceptionGroup("unhandled errors in a TaskGroup", list(errors))


def test_a_failure_that_was_foreseen_is_told_in_its_own_words():
    outcome = outcome_of(group(group(ServiceError("critic: its process is gone"))))
    assert (outcome.exit_code, outcome.text, outcome.unexpected) == (1, "critic: its process is gone", False)


def test_what_broke_on_the_way_down_does_not_hide_the_first_cause():
    outcome = outcome_of(group(RunFailed("policy.update failed: NaN"), KeyError("late")))
    assert outcome.text == "unexpected, see logs/controller.log: policy.update failed: NaN; KeyError: 'late'"
    assert (outcome.exit_code, outcome.unexpected) == (1, True)


def test_a_broken_invariant_decides_the_exit_code_whatever_else_failed():
    outcome = outcome_of(group(LedgerError("sample 7 is trained twice"), RunFailed("x"), AssertionError()))
    assert outcome.exit_code == 3
    assert outcome.text == "an invariant is broken: sample 7 is trained twice; x; AssertionError: "


def test_the_same_cause_is_told_once():
    failed = RunFailed("nothing moved for 900 s")
    assert outcome_of(group(failed, group(failed))).text == "nothing moved for 900 s"


def test_a_group_of_errors_is_told_by_its_causes():
    assert causes(group(ServiceError("a: gone"), group(ValueError("b")))) == "a: gone; ValueError: b"
