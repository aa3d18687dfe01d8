"""A service that only computes rows is replaced and its rows are sent again; any other death ends the run."""

from __future__ import annotations

from asyncflow.control.supervision.restart_policy import Resend, RestartPolicy
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.trace import trace

PPO = trace(ppo)
HOSTS = {s.name: "generator" if s.generates else s.service for s in PPO.stages}


def policy(limit: int = 2, window_seconds: float = 100.0) -> RestartPolicy:
    return RestartPolicy(PPO, HOSTS, ["reference", "reward"], limit, window_seconds)


def test_whoever_sent_to_it_sends_again():
    assert policy().replace("reward", now=0.0)
    assert policy().stages_of("reward") == ["reward.score#1"]
    assert policy().resend_to("reward.score#1") == [Resend("generator", "reward.score#1.0")]


def test_a_service_with_state_is_not_replaced():
    for service in ("policy", "critic", "generator", "advantage"):
        assert not policy().replace(service, now=0.0)
        assert not policy().may_die(service)


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
