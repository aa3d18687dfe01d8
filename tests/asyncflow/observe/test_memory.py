"""The memory of a service is that of all its processes, each counted once; a shared process is the controller's."""

from __future__ import annotations

import pytest

from asyncflow.observe.memory import DEVICE, PROCESS, RESIDENT, THIS, by_service, memory_here, total

RANK = {PROCESS: 1.0, RESIDENT: 100.0, DEVICE: 30.0}


def test_this_process_is_resident_and_uses_no_accelerator_before_torch_does():
    here = memory_here()
    assert here[RESIDENT] > 1e6
    assert here[DEVICE] == 0.0


def test_a_process_that_answers_twice_is_counted_once():
    here, two = memory_here(), total([RANK, RANK, {PROCESS: 2.0, RESIDENT: 50.0, DEVICE: 1.0}, memory_here()])
    assert two[RESIDENT] == pytest.approx(here[RESIDENT] + 150.0, rel=0.1)
    assert two[DEVICE] == 31.0
    assert two[PROCESS] == THIS


def test_services_that_share_the_controllers_process_are_in_its_memory():
    metrics = by_service({"policy": RANK, "reward": total([]), "gone": {}})
    assert metrics.keys() == {
        "memory.controller_resident_bytes",
        "memory.policy_resident_bytes",
        "memory.policy_device_bytes",
    }
    assert metrics["memory.policy_resident_bytes"] == 100.0
