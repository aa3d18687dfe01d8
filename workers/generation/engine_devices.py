"""Where the engine of a generation replica computes: on the devices of the ranks that it serves, and on no others.

ranks of the model   the engine's workers                                      weights come
one                  none: vLLM computes in the rank's process, on its device  in process
several              a process for each rank of the replica, on that rank's    through memory that both map: a file in
                     device; the engine that steps them is the first rank's    the machine's, CUDA IPC on a device

So no device has two engines, and with n replicas n engines draw side by side. A worker opens the windows of all ranks
of its replica, so it must see their devices: they are its CUDA_VISIBLE_DEVICES, in the order of the tensor indices, of
which vLLM's worker i takes the i-th. Of a device, a rank and a worker each have a CUDA context, and they take turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class RankDevice(msgspec.Struct, frozen=True):
    """Where one rank computes."""

    node: str
    device: str = ""  # CUDA's, as CUDA_VISIBLE_DEVICES names it; "" on a CPU


class EngineDevices(msgspec.Struct, frozen=True):
    """Where the engine of one replica does."""

    workers: int = 0  # processes of its own; 0: it computes in the process of its rank
    visible: str = ""  # their CUDA_VISIBLE_DEVICES; "" where there is nothing to say


IN_PROCESS = EngineDevices()


def cuda_device_of(node: str, index: int, visible: str | None) -> RankDevice:
    """Of the process that uses CUDA device `index` and has `visible` as its CUDA_VISIBLE_DEVICES."""
    return RankDevice(node, visible.split(",")[index].strip() if visible else str(index))


def engine_devices_of(ranks: int, replica: Sequence[RankDevice]) -> EngineDevices:
    """Where an engine computes for a replica, whose ranks have these seats by tensor index; `ranks` has the model.

    Raises ValueError, with the seats, for a replica on several nodes, and for one with two ranks on a device.
    """
    if ranks == 1:
        return IN_PROCESS
    devices = [seat.device for seat in replica]
    if len(nodes := {seat.node for seat in replica}) > 1:
        raise ValueError(
            f"{len(replica)} ranks that generate together are on nodes {', '.join(sorted(nodes))}: vLLM takes their "
            "weights from memory of one; cut generation over fewer tensor ranks (generation = '1-t')"
        )
    if any(devices) and len(set(devices)) < len(devices):
        raise ValueError(f"ranks that generate together are on CUDA devices {devices} of one node: want one each")
    return EngineDevices(len(replica), ",".join(filter(None, devices)))
