"""What is durable about a run: ledger, checkpoints, journals, timeline. The controller's only way to disk.

SQLite and files are used from one thread beside the event loop, in the order in which the calls were made.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from asyncflow.control.settings import Checkpoints
from asyncflow.control.store import checkpoint
from asyncflow.control.store.ledger import Ledger, LedgerError, State
from asyncflow.observe.exporter import Exporter
from asyncflow.observe.journal import MetricsJournal, read_lines
from asyncflow.observe.report import PART, write_report
from asyncflow.observe.timeline import Timeline
from asyncflow.services.channels.endpoint import Endpoint, ask
from protocols.control.events import CheckpointWritten, Evaluated, Event, Published, RunEnded, RunStarted, StepCommitted
from protocols.control.notices import Span
from protocols.control.requests import ExportModel, SaveState
from protocols.data.ids import prompt_of

T = TypeVar("T")
LOG = logging.getLogger("asyncflow.run")
_GAUGES = {  # of the last step, by the journal's names
    "clip_fraction": "policy.clip_fraction",
    "mismatch_kl_nats": "policy.mismatch_kl",
    "cost_mean": "cost_mean",
    "cost_multiplier": "multiplier",
    "kl_coefficient": "kl_coefficient",
}


class RunStore:
    """One run's folder while it is open."""

    def __init__(
        self,
        *,
        run: str,
        folder: Path,
        term: int,
        ledger: Ledger,
        checkpoints: Checkpoints,
        stateful: list[str],
        recipe_digest: str,
        exporter: Exporter,
        staleness: int,
        restored: str = "",
    ) -> None:
        """`restored` is the checkpoint of the ledger's version that this run goes on from, "" for a fresh one."""
        self.folder = folder
        self.term = term
        self.version = ledger.version
        self.cursor = ledger.cursor
        self.last_checkpoint = restored
        self._run, self._ledger, self._checkpoints = run, ledger, checkpoints
        self._stateful, self._recipe_digest, self._exporter = stateful, recipe_digest, exporter
        # The checkpoint that was restored is whole: to write it again would risk it for nothing.
        self._saved_step = self.version if restored else -1
        self._restarted = ledger.restart_live(term)
        self._live = set(self._restarted)
        self._generated: list[int] = []
        self._scored: list[int] = []
        self._was_scored: set[int] = set()
        self._committed_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._metrics = MetricsJournal(folder / "metrics.jsonl")
        self._evaluations = MetricsJournal(folder / "evaluations.jsonl")
        self._metrics.rewind(self.version)
        self._evaluations.rewind(self.version)
        self._evaluated_steps = {line["step"] for line in read_lines(folder / "evaluations.jsonl")}
        self._timeline = Timeline(folder / "timeline.jsonl")
        exporter.set("controller_term", term)
        exporter.set("staleness_bound_versions", staleness)

    async def _write(self, function: Callable[..., T], *arguments: Any) -> T:
        start = time.monotonic()
        result = await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments))
        self._exporter.observe("ledger_commit_seconds", time.monotonic() - start)
        return result

    # --- samples

    def restarted_prompts(self) -> list[int]:
        """Prompts that were live at the checkpoint this run goes on from, by id: to be drawn again."""
        return list(dict.fromkeys(prompt_of(s) for s in self._restarted))

    async def admit(self, samples: list[int], version: int, cursor: int) -> None:
        """Record new samples; durable when this returns."""
        self._live.update(samples)
        self.cursor = cursor
        await self._write(self._ledger.admit, samples, version, self.term, cursor)

    def generated(self, samples: list[int]) -> None:
        """Rows left the engine; recorded with the next flush."""
        self._generated += samples

    def scored(self, samples: list[int]) -> None:
        """Rows are at the join with everything they need; recorded with the next flush."""
        self._scored += samples

    async def flush(self) -> None:
        """Record what has gathered. Reports of two services may pass each other: scored wins."""
        scored, self._scored = [s for s in self._scored if s in self._live], []
        self._was_scored.update(scored)
        generated = [s for s in self._generated if s in self._live and s not in self._was_scored]
        self._generated = []
        if generated or scored:
            await self._write(self._advance, generated, scored)

    def _advance(self, generated: list[int], scored: list[int]) -> None:
        """One call of the thread: between two, `batched` would find samples that are not scored yet."""
        self._ledger.move(generated, "generated")
        self._ledger.move(scored, "scored")

    async def batched(self, samples: list[int]) -> None:
        """Rows form a batch."""
        await self.flush()
        await self._write(self._ledger.move, samples, "batched")

    async def regenerate(self, samples: list[int]) -> None:
        """The rows of live samples are gone with the process that made them, and what was heard of them is void.

        What is heard from now on is recorded behind it: nothing is awaited before the write is in its queue.
        """
        again = set(samples) & self._live
        self._generated = [sample for sample in self._generated if sample not in again]
        self._scored = [sample for sample in self._scored if sample not in again]
        self._was_scored -= again
        await self._write(self._ledger.regenerate, sorted(again), self.term)

    @property
    def live(self) -> list[int]:
        """Samples that have not ended, ascending."""
        return sorted(self._live)

    async def end(self, ended: list[tuple[int, State, str]]) -> None:
        """Samples end as dropped or failed, with their reasons; durable, all or none, when this returns.

        A group has to end in one call: a checkpoint between two would bring back a part of it.
        """
        self._forget([sample for sample, _, _ in ended])
        await self._write(self._ledger.end, ended)
        for _, state, reason in ended:
            self._exporter.inc("samples_total", state=state, reason=_bounded(reason))

    async def commit(self, step: int, samples: list[int]) -> float:
        """Samples trained and version raised, durably; seconds since the previous commit."""
        await self._write(self._ledger.commit_step, step, self.term, samples)
        self._forget(samples)
        self.version = step + 1
        now = time.monotonic()
        seconds, self._committed_at = now - self._committed_at, now
        return seconds

    def _forget(self, samples: list[int]) -> None:
        self._live.difference_update(samples)
        self._was_scored.difference_update(samples)

    # --- checkpoints

    def checkpoint_due(self, step: int) -> bool:
        """Whether the recipe wants a checkpoint after this step."""
        return bool(self._checkpoints.every) and step % self._checkpoints.every == 0

    async def write_checkpoint(self, services: Mapping[str, Endpoint], step: int) -> CheckpointWritten | None:
        """Write the checkpoint of a step, unless it is there; all stateful services at once."""
        if step == self._saved_step:
            return None
        await self.flush()
        start = time.monotonic()
        root = self.folder / "checkpoints"
        partial = await self._write(checkpoint.begin, root, step)
        async with asyncio.TaskGroup() as group:
            for name in self._stateful:
                (partial / name).mkdir()
                group.create_task(ask(services[name], SaveState(str(partial / name))), name=f"save {name}")
        await self._write(self._ledger.backup, partial / "ledger.db")
        path, size = await self._write(
            checkpoint.finish, partial, root, step, self.term, self.cursor, self._recipe_digest
        )
        await self._write(checkpoint.prune, root, self._checkpoints.keep)
        self._saved_step, self.last_checkpoint = step, str(path)
        seconds = time.monotonic() - start
        self._exporter.observe("checkpoint_seconds", seconds)
        self._exporter.set("checkpoint_bytes", size)
        self._exporter.set("last_checkpoint_timestamp_seconds", time.time())
        return CheckpointWritten(step=step, path=str(path), seconds=seconds, nbytes=size)

    async def export(self, policy: Endpoint) -> None:
        """Write the trained policy as a transformers folder, in one move."""
        partial, final = self.folder / ".policy.partial", self.folder / "policy"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        await ask(policy, ExportModel(str(partial)))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    # --- measurements

    def started(self, steps: int, services: list[str], warnings: list[str]) -> RunStarted:
        """The first event of a run."""
        return RunStarted(
            run=self._run,
            folder=str(self.folder),
            steps=steps,
            first_step=self.version,
            term=self.term,
            services=services,
            warnings=warnings,
        )

    def spent(self, spans: Iterable[Span]) -> None:
        """Time that services spent."""
        self._timeline.add(spans)

    def published(self, event: Published) -> None:
        """Weights are installed everywhere."""
        self._exporter.observe("weight_sync_seconds", event.seconds, phase="total")
        self._exporter.inc("weight_sync_bytes_total", event.nbytes * max(len(event.receipts), 1))

    def replaced(self, service: str) -> None:
        """A service died and another one took its place."""
        self._exporter.inc("restarts_total", role=service)

    def was_evaluated(self, step: int) -> bool:
        """Whether the journal holds this step's evaluation, e.g. from before a restart."""
        return step in self._evaluated_steps

    def evaluated(self, event: Evaluated) -> None:
        """A held-out evaluation is done."""
        self._evaluated_steps.add(event.step)
        self._evaluations.append(event)
        self._exporter.set("evaluation", event.value, metric=event.metric)

    def step_committed(self, event: StepCommitted, ages: list[int], samples_per_prompt: int) -> None:
        """Journal and export a step."""
        self._metrics.append(event)
        export, metrics = self._exporter, event.metrics
        export.inc("steps_total")
        export.inc("samples_trained_total", event.samples)
        export.inc("tokens_trained_total", event.tokens_generated)
        export.inc("samples_total", event.samples, state="trained", reason="")
        export.observe("step_seconds", event.seconds)
        export.set("last_step_timestamp_seconds", time.time())
        export.set("reward_mean", event.reward_mean)
        export.set("kl_reference_nats", event.kl)
        export.set("weights_version", self.version, replica="committed")
        for age in ages:
            for _ in range(samples_per_prompt):
                export.observe("trained_staleness_versions", age)
        for gauge, key in _GAUGES.items():
            if key in metrics:
                export.set(gauge, metrics[key])
        for name, value in metrics.items():
            if name.startswith(PART):
                export.set("reward_part_mean", value, part=name.removeprefix(PART))
        for role in ("policy", "critic", "cost_critic"):
            for name in ("loss", "gradient_norm"):
                if f"{role}.{name}" in metrics:
                    export.set(name, metrics[f"{role}.{name}"], role=role)
        export.inc("straggler_wait_seconds_total", metrics.get("wait.batch_seconds", 0.0))

    def log(self, event: Event) -> None:
        """The controller's own log: every event but the ones that only draw."""
        LOG.info("%s", event)

    def log_exception(self, error: BaseException) -> None:
        """An error that nobody expected, with its traceback."""
        LOG.error("unexpected", exc_info=error)

    async def finalize(self, ended: RunEnded) -> None:
        """Write timeline and report, close everything. Raises LedgerError where a finished run has samples open."""
        try:
            await self.flush()
        finally:
            totals = await self._write(self._ledger.totals)
            reasons = await self._write(self._ledger.reasons)
            self._exporter.set("ledger_imbalance", totals.imbalance)
            self._timeline.write(self.folder / "timeline.json")
            await self.abandon()
        await asyncio.to_thread(write_report, self.folder, reasons)
        LOG.info("%s; ledger: %s", ended, totals)
        if ended.outcome == "finished" and (totals.imbalance or totals.live):
            raise LedgerError(f"the run is finished and the ledger is not: {totals}")

    async def abandon(self) -> None:
        """Close everything as it is, after what is being written: who resumes the run has it to himself."""
        for part in (self._metrics, self._evaluations, self._timeline):
            part.close()
        await self._write(self._ledger.close)
        self._thread.shutdown()


def _bounded(reason: str) -> str:
    """A label value: the kind of a cause, not its text."""
    return reason.split(":", maxsplit=1)[0].split(" ", maxsplit=1)[0][:32] or "unknown"
