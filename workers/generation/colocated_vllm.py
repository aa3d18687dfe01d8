"""vLLM on the devices of a model that trains, in turns; it loads each version once, when it has to generate."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from protocols.data.messages import Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Partial
from protocols.weights import BadWeights, Probe, Version
from workers.generation.colocated import ColocatedEngine
from workers.generation.engine import generate_all
from workers.generation.vllm import VllmEngine
from workers.generation.weight_transfer import WeightTransfer, devices_of
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.settings import Generation, Model


class ColocatedVllm(ColocatedEngine):
    """One engine per generation replica, on the replica's first rank.

    `sleeps`: on CUDA, whether vLLM frees its memory between `release` and `publish`, at the cost of a copy to the host
    and back. Raises ValueError for generation in stages, which vLLM can't load, and if a replica's devices don't fit.
    """

    def __init__(
        self, hybrid: HybridEngine, model: Model, settings: Generation, run_seed: int, *, sleeps: bool = False
    ) -> None:
        super().__init__()
        replica = hybrid.tensor_group
        if hybrid.grouping.pp != 1:
            raise ValueError(f"generation in {hybrid.grouping.pp} stages: vLLM is fed where p_g is 1")
        devices = devices_of(hybrid)
        self._engine = (
            VllmEngine(model.path, settings, run_seed, model.dtype, devices=devices, sleeps=sleeps)
            if replica.index == 0
            else None
        )
        self._transfer = WeightTransfer(hybrid, self._engine)
        self._published: Version | None = None  # the last one, verified or not
        self._generating = True
        self.release()

    @property
    def generating(self) -> bool:
        return self._generating

    def _publish(self, version: Version, probe: Callable[[], Probe]) -> Transition | None:
        """Raises BadWeights if the engine of this rank's replica refuses the weights, and as long as it has none."""
        started = time.perf_counter()
        if self._engine is not None and not self._generating:
            self._engine.wake()
        self._generating = True
        if version == self._published:
            # No collective here: another replica's engine may have taken what this one's refused.
            if self._engine is not None and self._engine.version != version:
                raise BadWeights(f"weights of step {version.step}: this replica's engine refused them: it has none")
            return None
        self._published = version
        taken = self._transfer.publish(version, probe()).load_on(self._engine)
        seconds = time.perf_counter() - started
        return msgspec.structs.replace(taken.transition, seconds=seconds, copied_bytes=taken.copied_bytes)

    def generate(self, prompts: Prompts, sampling: Sampling) -> Partial[Rollouts] | None:
        return generate_all(self._engine, prompts, sampling) if self._engine is not None else None

    def release(self) -> None:
        if self._engine is not None and self._generating:
            self._engine.sleep()
        self._generating = False

    def close(self) -> None:
        """End the engine, and free the shared memory."""
        self._transfer.close()
        if self._engine is not None:
            self._engine.close()
