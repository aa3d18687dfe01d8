"""The durable state of a run in one term: ledger and checkpoints. The controller writes to disk only through it.

SQLite and files are used from one thread beside the event loop, in the order of the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from asyncflow.control.settings import Checkpoints
from asyncflow.control.store import checkpoint
from asyncflow.control.store.ledger import EndedSample, EndState, Ledger, LedgerError
from asyncflow.control.store.run_log import RunLog
from asyncflow.control.store.storage import failure, free_bytes, is_shortage, size_of, storing
from asyncflow.observe.report import write_report
from asyncflow.services.channels.endpoint import Endpoint, ServiceError, all_or_error, ask
from asyncflow.services.failpoints import reach
from protocols.control.events import CheckpointWritten, RunEnded, SamplesEnded
from protocols.control.requests import ExportModel, SaveState
from protocols.data.ids import prompt_of

EXPORT_PARTIAL = ".policy.partial"  # in the run folder, while the policy is exported

T = TypeVar("T")


class RunStore:
    """One run's folder during one term."""

    def __init__(
        self,
        *,
        folder: Path,
        term: int,
        ledger: Ledger,
        checkpoints: Checkpoints,
        stateful: list[str],
        recipe_digest: str,
        log: RunLog,
        restored: str = "",
    ) -> None:
        """`restored` is the checkpoint that this term starts from, "" for one that starts from step 0."""
        self.folder = folder
        self.term = term
        self.version = ledger.version
        self.cursor = ledger.cursor
        self.last_checkpoint = restored
        self.log = log
        log.rewind(self.version)
        self._ledger, self._checkpoints = ledger, checkpoints
        self.stateful, self._recipe_digest = stateful, recipe_digest
        # The restored checkpoint is complete; writing it again would risk it for nothing.
        self._saved_step = self.version if restored else -1
        self._checkpoint_bytes = size_of(Path(restored)) if restored else 0  # of the last one
        self._restarted = ledger.restart_live(term)
        self._live = set(self._restarted)
        self._generated: list[int] = []
        self._scored: list[int] = []
        self._was_scored: set[int] = set()
        self._committed_at = time.monotonic()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="run_store")
        log.exporter.set("controller_term", term)

    async def _write(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on the store's thread. Raises StorageFailed if the disk refuses what it writes."""
        start = time.monotonic()
        with storing("ledger and checkpoints", self.folder):
            result = await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments))
        self.log.exporter.observe("ledger_commit_seconds", time.monotonic() - start)
        return result

    # --- samples

    def restarted_prompts(self) -> list[int]:
        """Ids of the prompts that were live at the restored checkpoint and have to be generated again."""
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
        """All rows of the samples are at the join; recorded with the next flush."""
        self._scored += samples

    async def flush(self) -> None:
        """Record the reports so far. Reports of two services may overtake each other: scored wins over generated."""
        # A join that lost its rows reports their prompts again.
        scored = list(dict.fromkeys(s for s in self._scored if s in self._live and s not in self._was_scored))
        self._scored = []
        self._was_scored.update(scored)
        generated = [s for s in self._generated if s in self._live and s not in self._was_scored]
        self._generated = []
        if generated or scored:
            await self._write(self._advance, generated, scored)

    def _advance(self, generated: list[int], scored: list[int]) -> None:
        """One call on the thread: between two calls `batched` would find samples that are not scored yet."""
        self._ledger.move(generated, "generated")
        self._ledger.move(scored, "scored")

    async def batched(self, samples: list[int]) -> None:
        """The samples form a batch."""
        await self.flush()
        await self._write(self._ledger.move, samples, "batched")

    async def regenerate(self, samples: list[int]) -> None:
        """The rows of live samples died with the process that made them: void what was reported about them.

        Later reports are recorded after it, because nothing is awaited before the write is queued.
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

    async def end(self, ended: list[EndedSample]) -> None:
        """End samples as dropped or failed, each with its reason; durable, all or none, when this returns.

        A group has to end in one call: a checkpoint between two calls would bring half of it back.
        """
        if not ended:
            return
        self._forget([sample for sample, _, _ in ended])
        await self._write(self._ledger.end, ended)
        counts = Counter[tuple[EndState, str]]((state, reason) for _, state, reason in ended)
        for (state, reason), count in counts.items():
            self.log.emit(SamplesEnded(state=state, reason=reason, count=count))

    async def commit(self, step: int, samples: list[int]) -> float:
        """Mark samples trained and raise the version, durably. Returns the seconds since the previous commit."""
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
        """Whether the recipe asks for a checkpoint after this step."""
        return bool(self._checkpoints.every) and step % self._checkpoints.every == 0

    def is_saved(self, step: int) -> bool:
        """Whether the checkpoint of a step exists."""
        return step == self._saved_step

    async def write_checkpoint(self, services: Mapping[str, Endpoint], step: int) -> CheckpointWritten | None:
        """Write the checkpoint of a step, unless it exists; all stateful services save at the same time."""
        if self.is_saved(step):
            return None
        await self.flush()
        start = time.monotonic()
        root = self.folder / "checkpoints"
        with self._whole_or_not_at_all(f"checkpoint of step {step}", root / f".step_{step:06d}.partial"):
            path, size = await self._write_checkpoint(services, step, root)
        await self._write(checkpoint.prune, root, self._checkpoints.keep)
        self._saved_step, self.last_checkpoint, self._checkpoint_bytes = step, str(path), size
        seconds = time.monotonic() - start
        return CheckpointWritten(step=step, path=str(path), seconds=seconds, nbytes=size)

    async def _write_checkpoint(self, services: Mapping[str, Endpoint], step: int, root: Path) -> tuple[Path, int]:
        partial = await self._write(checkpoint.begin, root, step)
        if free_bytes(partial) < self._checkpoint_bytes:  # as large as the last one: known before anything is written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        async with all_or_error() as group:
            for name in self.stateful:
                (partial / name).mkdir(exist_ok=True)
                group.create_task(ask(services[name], SaveState(str(partial / name), step)), name=f"save {name}")
        await self._write(self._ledger.backup, partial / "ledger.db")
        reach("controller", "checkpoint")
        return await self._write(checkpoint.finish, partial, root, step, self.term, self.cursor, self._recipe_digest)

    async def export(self, policy: Endpoint) -> None:
        """Write the trained policy as a transformers folder, atomically."""
        partial, final = self.folder / EXPORT_PARTIAL, self.folder / "policy"
        with self._whole_or_not_at_all("policy", partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            await ask(policy, ExportModel(str(partial)))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    @contextlib.contextmanager
    def _whole_or_not_at_all(self, what: str, partial: Path) -> Iterator[None]:
        """Remove a folder that could not be finished, which leaves room for what the end of a run writes.

        Raises StorageFailed where the disk is the cause, also if another process met it.
        """
        try:
            yield
        except BaseException as error:
            written = size_of(partial) if partial.exists() else 0
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) or (isinstance(error, ServiceError) and is_shortage(str(error))):
                raise failure(what, partial.parent, error, max(written, self._checkpoint_bytes)) from error
            raise

    # --- the end

    async def finalize(self, ended: RunEnded) -> None:
        """Write timeline and report, close everything. After a rollback that failed midway neither is written.

        Raises LedgerError if a finished run left samples open, StorageFailed if the disk is full.
        """
        if self._closed:
            self.log.close()
            return
        try:
            await self.flush()
            totals = await self._write(self._ledger.totals)
            reasons = await self._write(self._ledger.reasons)
            self.log.exporter.set("ledger_imbalance", totals.imbalance)
            with storing("timeline", self.folder):
                self.log.write_timeline()
        finally:
            await self.abandon()
        with storing("report", self.folder):
            await asyncio.to_thread(write_report, self.folder, reasons, ended)
        counts = ", ".join(f"{count} {state}" for state, count in msgspec.structs.asdict(totals).items())
        self.log.file.info("samples in the ledger: %s", counts)
        if ended.outcome == "finished" and (totals.imbalance or totals.live):
            raise LedgerError(f"the run is finished and the ledger is not: {totals}")

    async def abandon(self) -> None:
        """Close everything as it is, after the pending writes: whoever resumes the run has the folder to itself."""
        self.log.close()
        await self.close()

    async def close(self) -> None:
        """Close the ledger after the pending writes: the term is over. Idempotent."""
        if not self._closed:
            self._closed = True
            await self._write(self._ledger.close)
            self._thread.shutdown()
