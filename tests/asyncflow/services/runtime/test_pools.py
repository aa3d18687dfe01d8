"""Pools on Ray: actors are placed in their pool's bundle, and a cluster that is too small is refused with numbers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from asyncflow.planner.costs.devices import CATALOGUE
from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.runtime import pools
from asyncflow.services.runtime.pools import PoolRequest, ReservedPools, bundle_of, refuse_shortage, shares_of
from tests.asyncflow.services.specs import service

CPUS = {"CPU": 2.0}
GPUS = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:A100": 1.0}


def test_a_device_is_an_accelerator_where_there_is_one_and_else_a_slot():
    assert bundle_of(PoolRequest(1), GPUS) == {"GPU": 1.0}
    assert bundle_of(PoolRequest(1), CPUS) == {"CPU": 0.25}
    assert bundle_of(PoolRequest(1, "cpu-slot"), GPUS) == {"CPU": 0.25}
    assert bundle_of(PoolRequest(1, "A100-80G"), GPUS) == {"GPU": 1.0, "accelerator_type:A100": 0.001}


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_device_that_can_be_planned_for_can_be_asked_for(name: str):
    assert bundle_of(PoolRequest(1, name), {})


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ServiceError, match="no device 'H999'; known: A100-80G, H100"):
        bundle_of(PoolRequest(1, "H999"), GPUS)


def shortage(requests: dict[str, PoolRequest], total: dict[str, float]) -> str:
    with pytest.raises(ServiceError) as refused:
        refuse_shortage(requests, {name: bundle_of(r, total) for name, r in requests.items()}, total)
    return str(refused.value)


def test_too_few_devices_are_refused_with_the_numbers():
    message = shortage({"train": PoolRequest(6), "rollout": PoolRequest(4)}, CPUS)
    assert message.startswith(
        "pools ask for 10 devices of 0.25 CPU (train 6, rollout 4); the cluster has 2 CPU, 8 slots"
    )
    message = shortage({"train": PoolRequest(8, "A100-80G"), "rollout": PoolRequest(1, "A100-80G")}, GPUS)
    assert message.startswith(
        "pools ask for 9 devices of 1 GPU and 0.001 accelerator_type:A100 (train 8, rollout 1); the"
    )
    assert "the cluster has 8 GPU" in message


def test_a_kind_of_device_that_the_cluster_lacks_is_refused():
    assert "the cluster has 0 accelerator_type:H100" in shortage({"train": PoolRequest(1, "H100")}, GPUS)


@pytest.mark.parametrize("tenants", [1, 2, 3, 7])
def test_services_that_share_a_device_fit_on_it(tenants: int):
    for bundle, option in (({"CPU": 0.25}, "num_cpus"), ({"GPU": 1.0, "accelerator_type:A100": 0.001}, "num_gpus")):
        share = shares_of(bundle, tenants)
        assert set(share) == {option}
        assert 0.9 * bundle[option[4:-1].upper()] < tenants * share[option] <= bundle[option[4:-1].upper()]


# --- on a Ray cluster


@ray.remote
class Where:
    """An actor that reports its placement."""

    def bundle(self) -> str | None:
        """The id of its placement group."""
        return ray.get_runtime_context().get_placement_group_id()


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    started = not ray.is_initialized()
    if started:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    yield
    if started:
        ray.shutdown()


def groups_of(reserved: ReservedPools, specs: Sequence[ServiceSpec]) -> dict[str, str | None]:
    """Service -> the placement group of its actor."""
    where: Any = Where
    actors: dict[str, Any] = {spec.name: where.options(**reserved.options(spec)).remote() for spec in specs}
    try:
        return {name: ray.get(actor.bundle.remote(), timeout=120) for name, actor in actors.items()}
    finally:
        for actor in actors.values():
            ray.kill(actor)


@pytest.mark.ray
@pytest.mark.usefixtures("two_cores")
async def test_services_are_placed_in_the_bundles_of_their_pools():
    specs = [service("policy", pool="train"), service("critic", pool="train"), service("generator", pool="rollout")]
    specs.append(service("advantage", pool=""))
    reserved = ReservedPools({"train": PoolRequest(1), "rollout": PoolRequest(2)})
    await reserved.reserve(specs, silence)
    assert not any(reserved.accelerates(spec) for spec in specs), "their devices are CPU slots"
    try:
        groups = groups_of(reserved, specs)
    finally:
        reserved.release()
    assert groups["policy"] == groups["critic"] != groups["generator"]
    assert groups["generator"] is not None and groups["advantage"] is None


@pytest.mark.ray
@pytest.mark.usefixtures("two_cores")
async def test_a_request_that_the_cluster_never_meets_is_refused_at_once_and_takes_nothing():
    before = set(placement_group_table())
    with pytest.raises(ServiceError, match=r"pools ask for 4000 devices of 0\.25 CPU"):
        await ReservedPools({"train": PoolRequest(4000)}).reserve([service("policy", pool="train")], silence)
    assert set(placement_group_table()) == before


@pytest.mark.ray
@pytest.mark.usefixtures("two_cores")
async def test_devices_that_another_run_holds_are_waited_for_which_is_told_at_once(monkeypatch: pytest.MonkeyPatch):
    slots = int(4 * ray.cluster_resources()["CPU"])
    first, second = (ReservedPools({"train": PoolRequest(slots)}) for _ in range(2))
    await first.reserve([service("policy", pool="train", run="their-run")], silence)
    told: list[str] = []
    try:
        monkeypatch.setattr(pools, "RESERVE_SECONDS", 2.0)
        monkeypatch.setattr(pools, "TELL_SECONDS", 1.0)
        with pytest.raises(ServiceError, match=r"pool 'train': \d+ x 0.25 CPU were not free within 2 s; stop"):
            await second.reserve([], told.append)
        (text,) = told
        assert f"pool 'train': {slots} x 0.25 CPU are not free; waits for them for 2 s: stop what uses them" in text
        assert "on the cluster 0 of 2 CPU are free; held by other runs: " in text
        assert f"their-run/train {slots} x 0.25 CPU" in text
        monkeypatch.setattr(pools, "RESERVE_SECONDS", 60.0)
        waiting = asyncio.create_task(second.reserve([], told.append))
        while len(told) < 2:
            await asyncio.sleep(0.05)
    finally:
        first.release()
    await waiting
    second.release()
    assert told[-1].startswith("the pools have their devices after ")


def silence(text: str) -> None:
    raise AssertionError(f"nothing has to be waited for: {text}")
