"""A service that does not answer is reported, then ended; who is asked again or was itself stopped blames nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncflow.control.supervision.liveness import MOST_SECONDS, Liveness, Silence

ENDS = {"reward": 10.0, "policy": 20.0}


def liveness() -> Liveness:
    return Liveness(report_seconds=10.0, end_seconds=ENDS.__getitem__)


def elapse(of: Liveness, seconds: float) -> list[Silence]:
    """Let time pass in ticks of half a second."""
    return [silence for _ in range(int(seconds / 0.5)) for silence in of.elapse(0.5)]


def test_silence_ends_a_service_once_and_one_that_trains_is_reported_first():
    services = liveness()
    services.asked("reward")
    services.asked("policy")
    assert elapse(services, 9.5) == []
    assert elapse(services, 0.5) == [Silence("reward", 10.0, ends=True), Silence("policy", 10.0, ends=False)]
    assert elapse(services, 30.0) == [Silence("policy", 20.0, ends=True)]


def test_an_answer_ends_a_silence_and_the_next_question_begins_another():
    services = liveness()
    for _ in range(5):
        services.asked("reward")
        assert elapse(services, 6.0) == []
        assert services.silent == {"reward": 6.0}
        services.answered("reward")
        assert services.silent == {}
    assert elapse(services, 60.0) == [], "nobody has asked"


def test_the_time_in_which_the_asking_process_was_stopped_itself_is_nobodys_silence():
    services = liveness()
    services.asked("reward")
    assert services.elapse(3600.0) == []
    assert services.silent == {}


@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "wait"]), st.floats(0.0, 5.0)), max_size=60))
def test_who_answers_in_time_is_never_ended(events: list[tuple[str, float]]):
    services, silence, asked = liveness(), 0.0, False
    for what, seconds in events:
        match what:
            case "ask":
                services.asked("reward")
                asked, silence = True, 0.0
            case "answer":
                services.answered("reward")
                asked = False
            case _:
                before, silence = silence, silence + min(seconds, MOST_SECONDS) * asked
                ended = [s for s in services.elapse(seconds) if s.ends]
                assert bool(ended) == (asked and before < ENDS["reward"] <= silence)
