"""A service that only computes rows is replaced and its rows are sent again; any other death ends the run."""

from __future__ import annotations

from asyncflow.control.supervision.restart_policy import Resend, RestartPolicy
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.trace import trace

PPO = trace(ppo)
HOSTS = {s.name: "generator" if s.generates else s.service for s in PPO.stages}


def policy(limit: int = 2) -> RestartPolicy:
    return RestartPolicy(PPO, HOSTS, ["reference", "reward"], limit)


def test_whoever_sent_to_it_sends_again():
    assert policy().replace("reward")
    assert policy().stages_of("reward") == ["reward.score#1"]
    assert policy().resend_to("reward.score#1") == [Resend("generator", "reward.score#1.0")]


def test_a_service_with_state_is_not_replaced():
    for service in ("policy", "critic", "generator", "advantage"):
        assert not policy().replace(service)
        assert not policy().may_die(service)


def test_a_service_that_dies_too_often_ends_the_run_and_others_are_counted_apart():
    deaths = policy(limit=2)
    assert [deaths.replace("reward") for _ in range(3)] == [True, True, False]
    assert deaths.replace("reference")
    assert deaths.deaths == {"reward": 3, "reference": 1}
