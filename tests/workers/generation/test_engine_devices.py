"""An engine uses the devices of the ranks that it serves, in their order, and no two engines share a device."""

from __future__ import annotations

import os

import pytest

from protocols.layout.topology import GenerationGrouping, Topology
from workers.generation.engine_devices import EngineDevices, RankDevice, cuda_device_of, engine_devices_of
from workers.generation.shared_buffer import BufferHandle
from workers.generation.vllm_internals import seen_by_workers

SWITCHES = ["1-1-1 -> 1-1", "1-2-1 -> 1-1", "1-2-1 -> 1-2", "1-2-2 -> 1-1", "1-4-1 -> 1-2", "2-4-1 -> 1-4"]


def places(switch: str, devices: list[RankDevice]) -> list[tuple[list[int], EngineDevices]]:
    """Per generation replica: its ranks in order of tensor index, and the devices of its engine."""
    topology, layout = map(Topology.parse, switch.split(" -> "))
    grouping = GenerationGrouping(topology, layout.pp, layout.tp)
    return [
        (ranks, engine_devices_of(topology.world_size, [devices[r] for r in ranks])) for ranks in grouping.tensor_groups
    ]


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_device_has_one_worker_of_one_engine_and_it_is_its_rank_s(switch: str):
    ranks = Topology.parse(switch.partition(" -> ")[0]).world_size
    devices = [RankDevice("here", str(7 - rank)) for rank in range(ranks)]
    found = places(switch, devices)
    if ranks == 1:
        assert found == [([0], EngineDevices())]  # in the rank's own process
        return
    assert sorted(rank for replica, _ in found for rank in replica) == list(range(ranks))
    for replica, place in found:
        assert place.workers == len(replica)
        assert place.visible.split(",") == [devices[rank].device for rank in replica]


def test_without_devices_workers_see_none():
    devices = [RankDevice("here")] * 4
    assert {place for _, place in places("1-4-1 -> 1-2", devices)} == {EngineDevices(2, "")}


def test_a_device_is_named_as_its_process_was_given_it():
    assert cuda_device_of("here", 0, "5") == RankDevice("here", "5")  # as Ray assigns one to a rank
    assert cuda_device_of("here", 1, "5, 6") == RankDevice("here", "6")
    assert cuda_device_of("here", 3, None) == cuda_device_of("here", 3, "") == RankDevice("here", "3")  # sees them all


def test_a_replica_on_two_nodes_is_refused():
    with pytest.raises(ValueError, match="2 ranks that generate together are on nodes a, b"):
        engine_devices_of(2, [RankDevice("a", "0"), RankDevice("b", "0")])


def test_two_ranks_of_a_replica_on_one_device_are_refused():
    with pytest.raises(ValueError, match=r"on CUDA devices \['3', '3'\] of one node: want one each"):
        engine_devices_of(4, [RankDevice("a", "3"), RankDevice("a", "3")])


def test_a_worker_opens_a_buffer_under_the_number_by_which_it_sees_the_device():
    written = BufferHandle(8, ipc_handle=(0, b"handle", 8, 0, b"", 0, b"", False))  # the writer sees one device
    assert written.on_device(1) == BufferHandle(8, ipc_handle=(1, b"handle", 8, 0, b"", 0, b"", False))
    assert BufferHandle(8, path="file").on_device(1) == BufferHandle(8, path="file")


@pytest.mark.parametrize("own", [None, "5"])
def test_the_devices_of_workers_are_set_only_while_they_start(monkeypatch: pytest.MonkeyPatch, own: str | None):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if own is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    with seen_by_workers("5,6"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == own
    with seen_by_workers(""):
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == own
