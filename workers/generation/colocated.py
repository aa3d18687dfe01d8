"""vLLM beside a model that trains: on the same devices, in turn, with the weights as they were trained last.

wake:  the ranks hand over what was trained since; every version once, and none that nobody draws with
draw:  each generation replica's rows, by the engine of its first rank
rest:  the devices are the training's again
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from protocols.data.messages import Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Partial
from protocols.weights import BadWeights, Probe, Version
from workers.generation.hybrid import draw_all
from workers.generation.vllm import VllmEngine
from workers.generation.weight_transfer import WeightTransfer, place_of
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.settings import Generation, Model


class ColocatedVllm:
    """One rank's side of it. All ranks of a topology construct one and call `wake` and `rest` together.

    `sleeps`: on CUDA, whether vLLM gives its memory back between `rest` and `wake`; it costs a copy to the host and
    back. Raises ValueError for generation in stages, which vLLM is not fed in, and where a replica's devices don't do.
    """

    def __init__(
        self, hybrid: HybridEngine, model: Model, settings: Generation, run_seed: int, *, sleeps: bool = False
    ) -> None:
        replica = hybrid.tensor_group
        if hybrid.grouping.pp != 1:
            raise ValueError(f"generation in {hybrid.grouping.pp} stages: vLLM is fed where p_g is 1")
        place = place_of(hybrid)
        self._engine = (
            VllmEngine(model.path, settings, run_seed, model.dtype, place=place, sleeps=sleeps)
            if replica.index == 0
            else None
        )
        self._handover = WeightTransfer(hybrid, self._engine)
        self._lineage = 0
        self._tried: Version | None = None  # the version that was handed over last, proven or not
        self.awake = True
        self.rest()

    def wake(self, step: int, probe: Callable[[], Probe]) -> Transition | None:
        """Have the weights of `step`, which answer `probe`; what that took, None where the engines have them already.

        Raises BadWeights where the engine of this rank's replica refuses them; asked again, where the engine is.
        """
        started, version = time.perf_counter(), Version(self._lineage, step)
        if self._engine is not None and not self.awake:
            self._engine.wake()
        self.awake = True
        if version == self._tried:
            # No collective here: another replica's engine may have taken what this one's refused.
            if self._engine is not None and self._engine.version != version:
                raise BadWeights(f"weights of step {step}: this replica's engine refused them: it draws with none")
            return None
        self._tried = version
        handed = self._handover.run(version, probe())
        seconds = time.perf_counter() - started
        return msgspec.structs.replace(handed.transition, seconds=seconds, copied_bytes=handed.copied_bytes)

    def draw(self, prompts: Prompts, sampling: Sampling) -> Partial[Rollouts] | None:
        """This generation replica's rows, drawn between `wake` and `rest`; None on ranks without an engine."""
        return draw_all(self._engine, prompts, sampling) if self._engine is not None else None

    def rest(self) -> None:
        """Leave the devices to training, until `wake`."""
        if self._engine is not None and self.awake:
            self._engine.sleep()
        self.awake = False

    def restored(self) -> None:
        """The model was loaded from a checkpoint: what comes is newer than anything before, whatever its step."""
        self._lineage += 1

    def close(self) -> None:
        """End the engine, and let the shared memory go."""
        self._handover.close()
        if self._engine is not None:
            self._engine.close()
