"""Generation by the ranks that train: rows wait, the ranks switch layouts, draw side by side, and switch back.

    prompts ──> mailbox ──> lease and turn: to_generation, 3D_ALL_MICRO_DP over the generation replicas, to_training
                                 └──> rollouts leave from the ranks that drew them; rows never pass the coordinator

What is drawn together is taken together, so nothing waits in a slot; a firing takes as many rows as the replicas have
slots, and training comes between two of them. The weights are those of the last update: never older than a prompt.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from asyncflow.services.channels.mailbox import Mailbox
from asyncflow.services.channels.shard_refs import Place
from asyncflow.services.ranks.spec import StageSpec
from asyncflow.services.stage_context import Fired, StageContext
from asyncflow.services.stages import RowStage
from protocols.control.notices import Generated
from protocols.control.requests import Done, SwitchLayout
from protocols.layout.topology import GenerationGrouping
from protocols.roles import Sampling


def replicas_of(grouping: GenerationGrouping) -> int:
    """Copies of the model that generate side by side."""
    return grouping.micro_dp * grouping.topology.dp


class ColocatedGeneration:
    """Owns the switches of a service's ranks, and the pause."""

    def __init__(self, host: StageContext) -> None:
        self._host = host
        self._going = asyncio.Event()
        self._going.set()

    def pause(self, paused: bool) -> None:
        """Begin no more firings, or go on; what is being drawn is finished."""
        if paused:
            self._going.clear()
        else:
            self._going.set()

    async def draw(
        self, stage: StageSpec, samples: Sequence[int], inputs: Sequence[Sequence[Place]], sampling: Sampling
    ) -> Fired:
        """Draw these rows, whose prompts are in `inputs`, when no pause is. Raises as `StageContext.fire` does."""
        host = self._host
        await self._going.wait()
        async with host.lease(stage.name):
            host.reports.wait(stage.name)
            await self._to_generation()
            try:
                fired = await host.fire(stage, samples, inputs, sampling=sampling)
            except Exception:
                if host.collective.in_step:
                    await host.ask_ranks(SwitchLayout("training"))
                raise
            await host.ask_ranks(SwitchLayout("training"))
        drawn = [sample for part in fired.parts for sample in part.shard.sample_ids]
        host.exporter.inc("tokens_generated_total", fired.drawn)
        if drawn:
            host.reports.notify(Generated(drawn, fired.drawn))
        return fired

    async def _to_generation(self) -> None:
        """Switch, and note what it took on rank 0: every rank of a layout moves as much but for the end stages."""
        reply, _ = await self._host.ask_ranks(SwitchLayout("generation"))
        assert isinstance(reply, Done)
        if not (took := reply.values):
            return  # the ranks' engine has these weights already
        self._host.exporter.observe("transition_seconds", took["seconds"])
        self._host.exporter.inc("transition_bytes_total", took["received_bytes"])
        self._host.exporter.set("transition_peak_bytes", took["peak_bytes"])
        self._host.exporter.set("transition_copied_bytes", took["copied_bytes"])
        self._host.reports.measure({f"transition.{name}": value for name, value in took.items()})


class ColocatedGeneratingStage(RowStage):
    """policy.generate of a service of several ranks: its rows are drawn between two switches."""

    def __init__(self, host: StageContext, spec: StageSpec, generation: ColocatedGeneration) -> None:
        super().__init__(host, spec)
        assert spec.sampling is not None
        self._sampling = spec.sampling
        self._generation = generation
        slots = host.spec.slots * replicas_of(host.generation)
        self._most = sys.maxsize if host.spec.deterministic else slots
        # Admission bounds what waits here.
        self._mailbox: Mailbox[Place] = Mailbox(1, sys.maxsize, in_id_order=True, ended=host.ended)

    async def fire(self, samples: Sequence[int], inputs: Sequence[Sequence[Place]]) -> Fired:
        return await self._generation.draw(self.spec, samples, inputs, self._sampling)

    def depth(self) -> tuple[int, int, int]:
        return self._mailbox.depth, 0, self._mailbox.peak
