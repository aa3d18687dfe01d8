"""The first signal drains, the second gives the step up, the third ends at once; the exit code says who asked."""

from __future__ import annotations

import signal

from asyncflow.cli.interrupts import Interrupts


def actions(*numbers: signal.Signals, started: bool) -> list[str]:
    interrupts = Interrupts()
    return [interrupts.take(number, started=started) for number in numbers]


def test_each_further_signal_of_any_kind_waits_for_less():
    sent = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    assert actions(*sent, started=True) == ["drain", "abandon", "cancel", "wait", "wait"]
    assert actions(*sent, started=False) == ["cancel", "wait", "exit", "exit", "exit"]


def test_a_saved_run_is_no_failure_for_who_sent_sigterm_and_interrupted_for_others():
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 130)):
        interrupts = Interrupts()
        interrupts.take(number, started=True)
        interrupts.take(signal.SIGINT, started=True)
        assert interrupts.code_of(130) == code
        assert interrupts.code_of(1) == 1, "not saved"
        assert interrupts.ended_at_once == 128 + number
    assert Interrupts().code_of(130) == 130, "a client of the run stopped it"
