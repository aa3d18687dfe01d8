"""Generation by the ranks that train: rows wait, the ranks switch layouts, generate side by side, and switch back.

    prompts ──> mailbox ──> lease: to_generation, 3D_ALL_MICRO_DP over the generation replicas, to_training
                                 └──> rollouts leave from the ranks that generated them, not through the coordinator

ColocatedGeneratingStage.run
    consumes      prompts from its mailbox, as many rows at once as the replicas have slots
    waits for     rows; then the end of a pause; then the lease of its pool
    unblocked by  a delivery; `pause(False)`; the controller's grant
    produces      rollouts and failures for the next stages, a Generated notice for the controller

All rows of a firing finish before the next one starts, so no row waits in a slot, and training comes between two
firings. The weights are those of the last update: never older than a prompt's admission.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from asyncflow.services.channels.mailbox import Mailbox
from asyncflow.services.channels.shard_refs import RowRef
from asyncflow.services.firing import Fired
from asyncflow.services.ranks.spec import StageSpec
from asyncflow.services.stage_context import StageContext
from asyncflow.services.stages import RowStage
from protocols.control.notices import Generated
from protocols.control.replies import Done
from protocols.control.requests import SwitchLayout
from protocols.layout.topology import GenerationGrouping
from protocols.roles import Sampling


def replicas_of(grouping: GenerationGrouping) -> int:
    """Number of generation replicas."""
    return grouping.micro_dp * grouping.topology.dp


class ColocatedGeneration:
    """Switches the ranks of one service between the layouts, and can be paused."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._going = asyncio.Event()
        self._going.set()

    def begin_term(self, context: StageContext) -> None:
        """Work for the context of a new term."""
        self._context = context

    def pause(self, paused: bool) -> None:
        """Start no more firings, or go on; rows that are being generated are finished."""
        if paused:
            self._going.clear()
        else:
            self._going.set()

    async def generate(
        self, stage: StageSpec, samples: Sequence[int], inputs: Sequence[Sequence[RowRef]], sampling: Sampling
    ) -> Fired:
        """Generate these rows, whose prompts are in `inputs`, unless paused. Raises as `StageContext.fire` does."""
        context = self._context
        await self._going.wait()
        async with context.lease(stage.name):
            context.reports.wait(stage.name)
            await self._to_generation()
            try:
                fired = await context.fire(stage, samples, inputs, sampling=sampling)
            except Exception:
                if context.collective.in_step:
                    await context.ask_ranks(SwitchLayout("training"))
                raise
            await context.ask_ranks(SwitchLayout("training"))
        generated = [sample for part in fired.parts for sample in part.shard.sample_ids]
        context.exporter.inc("tokens_generated_total", fired.generated_tokens)
        if generated:
            context.reports.notify(Generated(generated, fired.generated_tokens))
        return fired

    async def _to_generation(self) -> None:
        """Switch, and export what it took on rank 0: all ranks receive as much, except in the first and last stages."""
        reply, _ = await self._context.ask_ranks(SwitchLayout("generation"))
        assert isinstance(reply, Done)
        if not (took := reply.values):
            return  # the engine has these weights already
        self._context.exporter.observe("transition_seconds", took["seconds"])
        self._context.exporter.inc("transition_bytes_total", took["received_bytes"])
        self._context.exporter.set("transition_peak_bytes", took["peak_bytes"])
        self._context.exporter.set("transition_copied_bytes", took["copied_bytes"])
        self._context.reports.measure({f"transition.{name}": value for name, value in took.items()})


class ColocatedGeneratingStage(RowStage):
    """policy.generate of a service of several ranks: its rows are generated between two switches."""

    def __init__(self, context: StageContext, spec: StageSpec, generation: ColocatedGeneration) -> None:
        super().__init__(context, spec)
        assert spec.sampling is not None
        self._sampling = spec.sampling
        self._generation = generation
        slots = context.spec.slots * replicas_of(context.generation)
        self._most = sys.maxsize if context.spec.deterministic else slots
        # Admission bounds what waits here.
        self._mailbox: Mailbox[RowRef] = Mailbox(1, sys.maxsize, in_id_order=True, finished=context.finished)

    async def fire(self, samples: Sequence[int], inputs: Sequence[Sequence[RowRef]]) -> Fired:
        return await self._generation.generate(self.spec, samples, inputs, self._sampling)

    def depth(self) -> tuple[int, int, int]:
        return self._mailbox.depth, 0, self._mailbox.peak
