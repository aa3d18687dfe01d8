"""Devices of the cost model: data-sheet figures, and the share of each that real code reaches."""

from __future__ import annotations

import msgspec

from asyncflow.services.runtime import CPU_SLOT

GB = 1e9


class Refused(ValueError):
    """A request that no placement can satisfy; the message says why, with numbers."""


class Efficiency(msgspec.Struct, frozen=True):
    """The share of the data sheet that programs reach, and fixed overheads. A calibration measures these.

    The defaults are typical for large dense models; the same values serve all models, sizes and layouts.
    """

    compute: float = 0.5  # share of peak flops in large matrix products, the layers' small operations included
    bandwidth: float = 0.7  # share of memory bandwidth while decoding
    link: float = 0.7  # share of link and network bandwidth in collectives
    memory: float = 0.9  # share of memory for tensors; the rest is context, buffers and fragmentation
    link_latency_s: float = 2e-6  # a hop of a collective inside a node
    network_latency_s: float = 1e-5  # a hop across nodes
    host_step_s: float = 1e-3  # host overhead of a decoding step
    host_sequence_s: float = 1e-5  # and for each running sequence in it
    training: float = 0.5  # as `compute`, in training
    layer_s: float = 0.0  # fixed cost of a pass through a layer: launching its operations
    optimizer_s: float = 0.0  # fixed cost of an optimizer step
    publish_s: float = 0.0  # fixed cost of publishing, and of loading, a copy of the weights
    call_s: float = 0.0  # fixed cost of a call to a service
    record_s: float = 0.0  # cost of the durable record of a step

    def __post_init__(self) -> None:
        for name in ("compute", "training", "bandwidth", "link", "memory"):
            if not 0 < (share := getattr(self, name)) <= 1:
                raise ValueError(f"efficiency.{name} is a share in (0, 1], not {share}")


class Device(msgspec.Struct, frozen=True):
    """One accelerator of a node. Bandwidths are for one direction."""

    name: str
    peak_flops: float  # dense bfloat16, per second
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # to its neighbours in the node
    network_bytes_per_s: float  # its share of the node's network
    devices_per_node: int
    efficiency: Efficiency = Efficiency()
    cores: float = 0.0  # how many devices' work a node does at full speed at once, if they share cores; 0: no limit
    crowded: float = 0.0  # the same while more devices are busy than there are cores; 0: equal to `cores`

    @property
    def flops(self) -> float:
        """Flops per second that matrix products reach."""
        return self.peak_flops * self.efficiency.compute

    @property
    def training_flops(self) -> float:
        """Flops per second that matrix products reach in training."""
        return self.peak_flops * self.efficiency.training

    @property
    def bandwidth(self) -> float:
        """Bytes per second that decoding reads."""
        return self.memory_bytes_per_s * self.efficiency.bandwidth

    @property
    def usable_bytes(self) -> float:
        """Memory that tensors may use."""
        return self.memory_bytes * self.efficiency.memory

    def rate(self, ranks: int, sharing: int = 1) -> float:
        """Bytes per second of a collective over `ranks` neighbours; `sharing` concurrent rings use a node's network.

        Neighbours stay inside a node only if whole groups of them fill it.
        """
        if self._within_node(ranks):
            return self.link_bytes_per_s * self.efficiency.link
        return min(self.link_bytes_per_s, self.network_bytes_per_s * sharing) * self.efficiency.link

    def latency_s(self, ranks: int) -> float:
        """Seconds of one hop of a collective over `ranks` neighbours."""
        return self.efficiency.link_latency_s if self._within_node(ranks) else self.efficiency.network_latency_s

    def _within_node(self, ranks: int) -> bool:
        return ranks <= self.devices_per_node and self.devices_per_node % ranks == 0


CATALOGUE = {
    device.name: device
    for device in (
        Device("A100-80G", 312e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 8),
        Device("H100", 989e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 8),
        Device("H200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8),
        Device("MI300X", 1307e12, 192 * GB, 5300 * GB, 448 * GB, 50 * GB, 8),
        Device(CPU_SLOT, 5e10, 4 * GB, 10 * GB, 5 * GB, 1 * GB, 64),  # a share of a core: nominal until calibrated
    )
}


class Cluster(msgspec.Struct, frozen=True):
    """A number of devices of one kind."""

    device: Device
    count: int

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read "128xA100-80G". Raises Refused with the text and the known devices."""
        count, _, name = text.strip().partition("x")
        if not (count.isascii() and count.isdigit()) or name not in CATALOGUE:
            raise Refused(f"devices {text!r}: write COUNTxDEVICE, e.g. 128xA100-80G; know {', '.join(CATALOGUE)}")
        if int(count) < 1:
            raise Refused(f"devices {text!r}: an empty pool runs nothing; give at least 1 device")
        return cls(CATALOGUE[name], int(count))

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"
