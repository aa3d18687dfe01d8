"""From the ranks that train into vLLM, module by module: the weights are in two places, and nowhere a third time.

    training shards --HybridEngine.stream, a bucket at a time--> each rank's generation shard of a module
        --memory that all of them map--> each of vLLM's workers joins the module's shards, its loader keeps its part

A generation replica has one engine, in the process of its first rank; the shards of its t_g ranks reach the engine's
t_g workers through memory of the machine, so nothing crosses the network but what the transition itself gathers. What
exists twice is one generation shard a rank: the training shards stay as they are, vLLM has its own layout of it. No
rank has more than a bucket and a module besides, and a worker no more than one module (a fused group, the embedding)
at full size.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from protocols.weights import BadWeights, InstallReceipt, Probe, Version
from workers.generation.engine_devices import EngineDevices, RankDevice, cuda_device_of, engine_devices_of
from workers.generation.shared_buffer import BufferHandle, SharedBuffer
from workers.generation.vllm import VllmEngine
from workers.generation.vllm_internals import SharedPart
from workers.parallel.decoder import flat, laid_out
from workers.parallel.plan import ShardPlan
from workers.resharding.hybrid_engine import HybridEngine, Transition

T = TypeVar("T")


class TransferredWeights(msgspec.Struct, frozen=True):
    """What one hand-over took on this rank."""

    transition: Transition  # what arrived from other ranks, and the most that was held meanwhile
    copied_bytes: int  # of this rank's generation shard, which vLLM now has a second time
    receipt: InstallReceipt | None  # the engine's, on the rank that has it


class WeightTransfer:
    """One rank's side of it. All ranks of a topology construct one and call `run` together.

    `engine` is the generation replica's, on its first rank; the others have none. Raises ValueError for generation in
    stages, and where engine and replica don't fit. Close it to let the shared memory go.
    """

    def __init__(self, hybrid: HybridEngine, engine: VllmEngine | None) -> None:
        _refuse_misfit(hybrid, engine)
        self._hybrid, self._engine, self._replica = hybrid, engine, hybrid.tensor_group
        self._plan = hybrid.shard.plan
        self._specs = {spec.name: spec for spec in self._plan.parameters(0)}
        self._own: SharedBuffer | None = None
        self._windows: list[BufferHandle] = []  # of the replica's ranks, where the engine's workers are other processes
        if self._replica.gather_bytes(b"processes" if engine and engine.workers else b"")[0]:
            size = max(sum(map(self._shard_bytes, module)) for module in modules_of(self._plan))
            self._own = SharedBuffer(size, hybrid.device)
            encoded = self._replica.gather_bytes(msgspec.msgpack.encode(self._own.window))
            windows = [msgspec.msgpack.decode(window, type=BufferHandle) for window in encoded]
            self._windows = [window.on_device(index) for index, window in enumerate(windows)]

    def run(self, version: Version, probe: Probe | None) -> TransferredWeights:
        """Bring the weights as they are trained now to the engine, as `version`, which answers `probe`.

        Raises BadWeights, on every rank of a replica whose engine refuses: it then serves nothing until it is given
        weights that it proves. Such ranks have taken part to the end, so that other replicas' ranks don't wait.
        """
        refusals: list[BadWeights] = []

        def engine_does(act: Callable[[VllmEngine], T]) -> T | None:
            if self._engine is None or refusals:
                return None
            try:
                return act(self._engine)
            except BadWeights as error:
                refusals.append(error)
                return None

        engine_does(lambda engine: engine.start_taking(version))
        copied, modules = 0, self._arriving()
        while not isinstance(module := next(modules), Transition):
            copied += sum(tensor.numel() * tensor.itemsize for tensor in module.values())
            part = self._shared(module) or module
            engine_does(lambda engine, part=part: engine.take(part))
            self._meet()  # the workers have read: the windows may be written again
        receipt = engine_does(lambda engine: engine.finish_taking(version, probe))
        if self._meet(len(refusals)):
            raise refusals[0] if refusals else BadWeights(f"version {version}: this rank's replica's engine refused it")
        return TransferredWeights(module, copied, receipt)

    def close(self) -> None:
        """Let the shared memory go."""
        if self._own is not None:
            self._own.close()

    def _arriving(self) -> Generator[dict[str, Tensor] | Transition, None, None]:
        """This rank's generation shard, module by module as it becomes complete; at last what that took."""
        missing = [set(module) for module in modules_of(self._plan)]
        arrived: dict[str, Tensor] = {}
        stream = self._hybrid.stream()
        while True:
            try:
                arrived |= next(stream)
            except StopIteration as ended:
                yield ended.value
                return
            for module in [module for module in missing if module <= arrived.keys()]:
                missing.remove(module)
                yield {name: arrived.pop(name) for name in sorted(module)}

    def _shared(self, module: Mapping[str, Tensor]) -> list[SharedPart]:
        """Write this rank's shards where the workers read all ranks'; none where they are in this process."""
        if self._own is None:
            return []
        parts: list[SharedPart] = []
        start = 0
        for name, tensor in module.items():
            spec = self._specs[name]
            entries = flat(laid_out(tensor, spec), spec)
            stop = start + entries.numel() * entries.itemsize
            self._own.memory[start:stop].view(entries.dtype).copy_(entries)
            parts.append(SharedPart(spec, str(entries.dtype).removeprefix("torch."), start, stop, self._windows))
            start = stop
        self._meet()
        return parts

    def _meet(self, refusals: int = 0) -> int:
        """Wait until all ranks of the replica are here, and what each one's device had to do is done.

        Returns the number of refusals of all.
        """
        device = self._hybrid.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return int(self._replica.sum_(torch.tensor(refusals, device=device)))

    def _shard_bytes(self, name: str) -> int:
        return self._plan.shard_elements(self._specs[name]) * self._hybrid.dtype.itemsize


def place_of(hybrid: HybridEngine) -> EngineDevices:
    """Where the engine of this rank's generation replica computes. All ranks of the replica call."""
    device, node = hybrid.device, platform.node()
    seat = RankDevice(node)
    if device.type == "cuda":
        seat = cuda_device_of(node, device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES"))
    seats = hybrid.tensor_group.gather_bytes(msgspec.msgpack.encode(seat))
    return engine_devices_of(
        hybrid.grouping.topology.world_size, [msgspec.msgpack.decode(seat, type=RankDevice) for seat in seats]
    )


def modules_of(plan: ShardPlan) -> list[list[str]]:
    """The parameters, of a plan of one stage, that vLLM keeps in one module: it packs a module when it has all."""
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
