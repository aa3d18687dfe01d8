"""Copies weights from the ranks that train into vLLM, one module at a time, so there are never three full copies.

    training shards --HybridEngine.stream, a bucket at a time--> each rank's generation shard of a module
        --shared buffers--> each of vLLM's workers joins the shards, and its loader keeps the worker's part

A generation replica has one engine, in the process of its first rank. The shards of its t_g ranks reach the engine's
t_g workers through memory of the machine, so the network carries only what the transition itself gathers. Two
copies exist: the training shards, and the generation shards in vLLM's layout. In addition a rank holds at most one
bucket and one module, and a worker at most one module (a fused group, the embedding) at full size.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Generator, Iterator, Mapping

import msgspec
import torch
from torch import Tensor

from protocols.version import InstallReceipt, Version
from protocols.weights import BadWeights, Probe
from workers.generation.engine_devices import EngineDevices, RankDevice, cuda_device_of, engine_devices_of
from workers.generation.publication import Part
from workers.generation.shared_buffer import BufferHandle, SharedBuffer, SharedTensor, SharedTensors
from workers.generation.vllm import VllmEngine
from workers.parallel.decoder import flat, laid_out
from workers.parallel.plan import ShardPlan
from workers.resharding.hybrid_engine import HybridEngine, Transition


class TransferredWeights(msgspec.Struct, frozen=True):
    """What one transfer took on this rank."""

    transition: Transition  # what arrived from other ranks, and the most that was held meanwhile
    copied_bytes: int  # of this rank's generation shard, which vLLM now has a second time
    receipt: InstallReceipt | None  # the engine's, on the rank that has it


class WeightTransfer:
    """One rank's side of the transport. All ranks of a topology construct one and publish together.

    `engine` is the generation replica's, on its first rank; the others have none. Raises ValueError for generation in
    stages, and where engine and replica don't fit. Close it to free the shared memory.
    """

    def __init__(self, hybrid: HybridEngine, engine: VllmEngine | None) -> None:
        _refuse_misfit(hybrid, engine)
        self._hybrid, self._replica = hybrid, hybrid.tensor_group
        self._plan = hybrid.shard.plan
        self._specs = {spec.name: spec for spec in self._plan.parameters(0)}
        nbytes = {name: self._plan.shard_elements(s) * hybrid.dtype.itemsize for name, s in self._specs.items()}
        self.shard_bytes = sum(nbytes.values())  # of this rank's generation shard
        self._buffer: SharedBuffer | None = None  # where the engine's workers are other processes
        self._handles: list[BufferHandle] = []  # of the buffers of the replica's ranks
        if self._replica.gather_bytes(b"processes" if engine and engine.workers else b"")[0]:
            size = max(sum(map(nbytes.__getitem__, module)) for module in modules_of(self._plan))
            self._buffer = SharedBuffer(size, hybrid.device)
            encoded = self._replica.gather_bytes(msgspec.msgpack.encode(self._buffer.handle))
            handles = [msgspec.msgpack.decode(handle, type=BufferHandle) for handle in encoded]
            self._handles = [handle.on_device(index) for index, handle in enumerate(handles)]

    def publish(self, version: Version, probe: Probe | None) -> StreamedWeights:
        """The weights as they are trained now, as `version`. Nothing moves before every rank calls `load_on`."""
        return StreamedWeights(self, version, probe)

    def close(self) -> None:
        """Free the shared memory."""
        if self._buffer is not None:
            self._buffer.close()

    def parts(self) -> Generator[Part, None, Transition]:
        """This rank's generation shard, module by module as each becomes complete; returns what that took."""
        missing = [set(module) for module in modules_of(self._plan)]
        arrived: dict[str, Tensor] = {}
        stream = self._hybrid.stream()
        while True:
            try:
                arrived |= next(stream)
            except StopIteration as ended:
                return ended.value
            for module in [module for module in missing if module <= arrived.keys()]:
                missing.remove(module)
                yield self.share({name: arrived.pop(name) for name in sorted(module)})
                self.synchronize()  # the workers have read: the buffers may be written again

    def share(self, module: Mapping[str, Tensor]) -> Part:
        """A module as the engine installs it: in the buffers that its workers read, or as it is in this process."""
        if self._buffer is None:
            return module.items()
        tensors: list[SharedTensor] = []
        start = 0
        for name, tensor in module.items():
            spec = self._specs[name]
            entries = flat(laid_out(tensor, spec), spec)
            stop = start + entries.nbytes
            self._buffer.memory[start:stop].view(entries.dtype).copy_(entries)
            tensors.append(SharedTensor(spec, str(entries.dtype).removeprefix("torch."), start, stop))
            start = stop
        self.synchronize()
        return SharedTensors(tensors, self._handles)

    def synchronize(self, refusals: int = 0) -> int:
        """Wait until all ranks of the replica have called and their devices are idle; the sum of their refusals."""
        device = self._hybrid.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return int(self._replica.sum_(torch.tensor(refusals, device=device)))


class StreamedWeights:
    """A version that all ranks of the topology stream together, each with the shards that it gathers.

    No digests: the bytes stay in the memory of one machine, which the probe covers as well as the installation.
    """

    shapes = None

    def __init__(self, transfer: WeightTransfer, version: Version, probe: Probe | None) -> None:
        self.version, self.probe = version, probe
        self._transfer = transfer
        self._transition: Transition | None = None
        self._stream = self._parts()

    def verify(self) -> None:
        """Nothing to verify: see the class."""

    def parts(self) -> Iterator[Part]:
        return self._stream

    def load_on(self, engine: VllmEngine | None) -> TransferredWeights:
        """Have the replica's engine load this version. Every rank calls: the first of a replica with its engine.

        Raises BadWeights on every rank of a replica whose engine refuses: it then serves nothing until it is given
        weights that it verifies. Such ranks have taken part to the end, so that other replicas' ranks don't wait.
        """
        receipt = refusal = None
        if engine is not None:
            try:
                receipt = engine.load(self)
            except BadWeights as error:
                refusal = error
        for _ in self._stream:
            pass
        if self._transfer.synchronize(int(refusal is not None)):
            raise refusal or BadWeights(f"version {self.version}: this rank's replica's engine refused it")
        assert self._transition is not None
        return TransferredWeights(self._transition, self._transfer.shard_bytes, receipt)

    def _parts(self) -> Iterator[Part]:
        self._transition = yield from self._transfer.parts()


def devices_of(hybrid: HybridEngine) -> EngineDevices:
    """Where the engine of this rank's generation replica computes. All ranks of the replica call."""
    device, node = hybrid.device, platform.node()
    own = RankDevice(node)
    if device.type == "cuda":
        own = cuda_device_of(node, device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES"))
    encoded = hybrid.tensor_group.gather_bytes(msgspec.msgpack.encode(own))
    ranks = [msgspec.msgpack.decode(rank, type=RankDevice) for rank in encoded]
    return engine_devices_of(hybrid.grouping.topology.world_size, ranks)


def modules_of(plan: ShardPlan) -> list[list[str]]:
    """The parameters, of a plan of one stage, by vLLM's modules: it processes a module's weights when it has all."""
    modules: dict[str, list[str]] = {}
    for spec in plan.parameters(0):
        modules.setdefault((spec.fused or spec.name).rpartition(".")[0], []).append(spec.name)
    return list(modules.values())


def _refuse_misfit(hybrid: HybridEngine, engine: VllmEngine | None) -> None:
    ranks, index = hybrid.tensor_group.size, hybrid.tensor_group.index
    if hybrid.grouping.pp != 1:
        raise ValueError(f"generation in {hybrid.grouping.pp} stages: vLLM is fed where p_g is 1")
    if (engine is not None) != (index == 0):
        raise ValueError(f"rank {index} of {ranks} that generate together: the first has the engine, the others none")
    if engine is not None and max(engine.workers, 1) != ranks:
        raise ValueError(f"an engine of {engine.workers} worker processes for a replica of {ranks} ranks")
