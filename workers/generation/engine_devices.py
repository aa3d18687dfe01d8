"""The devices of a generation replica's engine: those of the ranks that it generates for, and no others.

ranks of the model   the engine's workers                             weights arrive
one                  none: vLLM computes in the rank's process,       in process
                     on its device
several              a process for each rank of the replica, on       through memory that both map: a file of the
                     that rank's device; the first rank steps them    machine, or CUDA IPC on a device

So no device has two engines, and n replicas have n engines that generate at the same time. A worker opens the shared
buffers of all ranks of its replica, so it must see their devices: its CUDA_VISIBLE_DEVICES lists them in the order of
the tensor indices, and vLLM's worker i uses the i-th. A rank and a worker each have a CUDA context on their device.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class RankDevice(msgspec.Struct, frozen=True):
    """The device of one rank."""

    node: str
    device: str = ""  # CUDA's, as CUDA_VISIBLE_DEVICES names it; "" on a CPU


class EngineDevices(msgspec.Struct, frozen=True):
    """The worker processes of one replica's engine, and their devices."""

    workers: int = 0  # processes of its own; 0: it computes in the process of its rank
    visible: str = ""  # the workers' CUDA_VISIBLE_DEVICES; "" on a CPU and without workers


IN_PROCESS = EngineDevices()


def cuda_device_of(node: str, index: int, visible: str | None) -> RankDevice:
    """The device of a process that uses CUDA device `index` and has `visible` as its CUDA_VISIBLE_DEVICES."""
    return RankDevice(node, visible.split(",")[index].strip() if visible else str(index))


def engine_devices_of(ranks: int, replica: Sequence[RankDevice]) -> EngineDevices:
    """The devices of a replica's engine; `replica` has those of its ranks by tensor index, the model has `ranks` ranks.

    Raises ValueError, naming them, for a replica on several nodes, and for two ranks on one device.
    """
    if ranks == 1:
        return IN_PROCESS
    devices = [rank.device for rank in replica]
    if len(nodes := {rank.node for rank in replica}) > 1:
        raise ValueError(
            f"{len(replica)} ranks that generate together are on nodes {', '.join(sorted(nodes))}: vLLM takes their "
            "weights from the memory of one; cut generation over fewer tensor ranks (generation = '1-t')"
        )
    if any(devices) and len(set(devices)) < len(devices):
        raise ValueError(f"ranks that generate together are on CUDA devices {devices} of one node: want one each")
    return EngineDevices(len(replica), ",".join(filter(None, devices)))
