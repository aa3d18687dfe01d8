"""A service that only computes rows is replaced; one that trains is rolled back, as long as that gets somewhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncflow.control.supervision.restart_policy import GiveUp, Resend, RestartPolicy, RollBack
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.trace import trace

PPO = trace(ppo)
HOSTS = {s.name: "generator" if s.generates else s.service for s in PPO.stages}


def policy(limit: int = 2, window_seconds: float = 100.0) -> RestartPolicy:
    return RestartPolicy(PPO, HOSTS, ["reference", "reward"], ["policy", "critic"], limit, window_seconds)


def test_whoever_sent_to_it_sends_again():
    assert policy().replace("reward", now=0.0)
    assert policy().stages_of("reward") == ["reward.score#1"]
    assert policy().resend_to("reward.score#1") == [Resend("generator", "reward.score#1.0")]


def test_a_service_with_state_is_not_replaced():
    for service in ("policy", "critic", "generator", "advantage"):
        assert not policy().replace(service, now=0.0)
        assert not policy().may_die(service)
    assert [policy().has_state(service) for service in ("policy", "critic", "generator")] == [True, True, False]


def test_a_service_that_dies_too_often_ends_the_run_and_others_are_counted_apart():
    deaths = policy(limit=2)
    assert [deaths.replace("reward", now=float(i)) for i in range(3)] == [True, True, False]
    assert deaths.refusal("reward") == "reward died 3 times within 100 s, more than failures.restarts = 2 allows"
    assert deaths.replace("reference", now=3.0)
    assert deaths.deaths == {"reward": 3, "reference": 1}


def test_deaths_that_are_longer_ago_than_the_window_do_not_count():
    """Or a run of weeks would end at its fourth death."""
    deaths = policy(limit=1, window_seconds=100.0)
    assert [deaths.replace("reward", now) for now in (0.0, 100.0, 200.0, 299.0)] == [True, True, True, False]
    assert deaths.deaths["reward"] == 4


# --- rollbacks


def test_the_first_rollback_is_at_once_and_one_after_progress_too():
    deaths = policy(limit=2)
    assert deaths.roll_back(["policy"], committed=7, now=0.0) == RollBack(0.0)
    assert deaths.roll_back(["critic"], committed=8, now=1.0) == RollBack(0.0)


def test_rollbacks_that_get_nowhere_wait_longer_each_time_then_the_run_ends():
    """A batch that makes the trainer run out of memory would do so for ever."""
    deaths = policy(limit=7, window_seconds=1.0)
    decisions = [deaths.roll_back(["policy"], committed=7, now=100.0 * i) for i in range(9)]
    assert decisions[:8] == [RollBack(seconds) for seconds in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)]
    assert decisions[8] == GiveUp(
        "8 rollbacks from step 7 made no step beyond it, more than failures.restarts = 7 allows"
    )


def test_a_rollback_that_loses_steps_has_to_pass_them_to_count_as_progress():
    """Back to step 4, then dead at step 6 each time: step 7 was reached before."""
    deaths = policy(limit=1, window_seconds=1.0)
    assert deaths.roll_back(["policy"], committed=7, now=0.0) == RollBack(0.0)
    assert deaths.roll_back(["policy"], committed=6, now=100.0) == RollBack(1.0)
    assert isinstance(deaths.roll_back(["policy"], committed=6, now=200.0), GiveUp)


def test_a_trainer_that_dies_too_often_in_the_window_ends_the_run_though_it_makes_progress():
    deaths = policy(limit=2, window_seconds=100.0)
    decisions = [deaths.roll_back(["policy"], committed=i, now=float(i)) for i in range(3)]
    assert decisions == [
        RollBack(0.0),
        RollBack(0.0),
        GiveUp("policy died 3 times within 100 s, more than failures.restarts = 2 allows"),
    ]


def test_without_restarts_the_first_death_ends_the_run():
    assert isinstance(policy(limit=0).roll_back(["policy"], committed=7, now=0.0), GiveUp)


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.sets(st.sampled_from(["policy", "critic"]), min_size=1), st.integers(0, 6)), max_size=40),
)
def test_however_trainers_die_the_rollbacks_between_two_new_steps_are_bounded(
    limit: int, deaths: list[tuple[set[str], int]]
):
    deciding, fruitless, reached = policy(limit, window_seconds=0.5), 0, -1
    for number, (dead, committed) in enumerate(deaths):
        decision = deciding.roll_back(dead, committed, now=float(number))
        fruitless = 0 if committed > reached else fruitless + 1
        reached = max(reached, committed)
        assert isinstance(decision, GiveUp) == (fruitless > limit or limit == 0)
        if isinstance(decision, GiveUp):
            return
