"""The end of a run that is stopped: its step is finished, or given up at the deadline or where a client asks for it.

A step that one of its models has finished is waited for, since that model can't go back; so is a checkpoint that is
being written.
"""

from __future__ import annotations

import asyncio
from typing import Any

from asyncflow.control.step_boundary import StepBoundary
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.train_step import TrainStep


class Drain:
    """The drain of one term. `abandon`: set where the step that is training is not waited for."""

    def __init__(
        self,
        deadline_seconds: float,
        train_step: TrainStep,
        boundary: StepBoundary,
        run_store: RunStore,
        abandon: asyncio.Event,
    ) -> None:
        self._deadline = deadline_seconds
        self._train_step, self._boundary, self._run_store = train_step, boundary, run_store
        self._abandon = abandon

    async def wait(self, steps: asyncio.Task[Any]) -> tuple[int, str] | None:
        """Wait for the task that makes the steps, at most as long as the deadline, unless the step has to be finished.

        Returns:
            None if the task is done, or the step has to be finished. Otherwise the task was cancelled and the last
            committed step is saved: the exit code, which is 1 where that failed, and what happened, in words.
        """
        if not self._abandon.is_set():
            asked = asyncio.create_task(self._abandon.wait(), name="a stop without the step")
            await asyncio.wait({steps, asked}, timeout=self._deadline, return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
        if steps.done() or self._train_step.partly_done or self._boundary.writing:
            return None
        steps.cancel()
        await asyncio.wait({steps})
        given_up = await self._boundary.abandon_step()
        why = "" if self._abandon.is_set() else f"not drained within {self._deadline:g} s: "
        saved = not self._run_store.version or self._run_store.is_saved(self._run_store.version)
        return 130 if saved else 1, why + given_up
