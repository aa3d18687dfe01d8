"""Generation: one engine, stepped in the service's compute thread, fed by the mailboxes of its generating stages.

GenerationLoop.run
    consumes      jobs (rows that were submitted together) and loads (published weights)
    waits for     rows whose weights are installed, or a load; then the lease of its pool
    unblocked by  `submit`, `load`, `pause`; the controller's grant
    produces      finished rows for their jobs, receipts for loads, a Generated notice for the controller

A row enters the engine only with weights at least as new as its prompt's admission (its `min_version`), and that is
checked before it takes a slot. Loads stand between two steps and preempt running rows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import numpy as np

from asyncflow.services.channels.endpoint import Frame
from asyncflow.services.failpoints import reach
from asyncflow.services.ranks.spec import ModelSettings
from asyncflow.services.stage_context import StageContext
from protocols.control.notices import Generated
from protocols.data.columns import take
from protocols.data.messages import Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Failure
from protocols.version import InstallReceipt
from protocols.weights import BadWeights, WeightManifest
from workers.generation.engine import Engine, FinishedRow, submit_rows, to_rollouts
from workers.settings import Model

STEPS_PER_TURN = 16


class Job:
    """Rows that were submitted together, and where they go as they finish."""

    def __init__(
        self, prompts: Prompts, sampling: Sampling, give: Callable[[Rollouts | None, list[Failure]], None], whole: bool
    ) -> None:
        self.prompts = prompts
        self.sampling = sampling
        self._give = give
        self._whole = whole  # give everything at once, in id order
        self._open = set(prompts.sample_ids.tolist())
        self._finished: list[FinishedRow] = []
        self._failures: list[Failure] = []

    def finish(self, rows: list[FinishedRow], failures: list[Failure]) -> None:
        """Add rows that finished or failed, and give them on."""
        self._open -= {r.sample_id for r in rows} | {f.sample_id for f in failures}
        self._finished += rows
        self._failures += failures
        if self._whole and self._open:
            return
        rows, failures = self._finished, self._failures
        self._finished, self._failures = [], []
        if self._whole:
            rows.sort(key=lambda r: r.sample_id)
        self._give(to_rollouts(self.prompts, rows) if rows else None, failures)


class GenerationLoop:
    """Owns an engine and decides between two steps what it does next."""

    def __init__(self, context: StageContext, engine: Engine, load_trained: Callable[[], None] | None) -> None:
        self._context = context
        self._engine = engine
        self._load_trained = load_trained  # for an engine that shares the trained model: loads its newest version
        self._waiting: deque[tuple[Job, Prompts]] = deque()
        self._running: dict[int, Job] = {}
        self._loads: deque[tuple[WeightManifest, Frame, asyncio.Future[InstallReceipt]]] = deque()
        self._wake = asyncio.Event()
        self._paused = False
        self._counted = 0  # tokens of the engine that were reported
        self._followers: list[Callable[[str], None]] = []

    def on_wait(self, follower: Callable[[str], None]) -> None:
        """Have a function told what generation waits for: "rows", "weights", "lease", or "" while it generates."""
        self._followers.append(follower)

    def submit(self, job: Job) -> None:
        """Queue a job's rows."""
        self._waiting.append((job, job.prompts))
        self._wake.set()

    async def load(self, manifest: WeightManifest, buffer: Frame) -> InstallReceipt:
        """Install weights between two steps. Raises BadWeights."""
        done: asyncio.Future[InstallReceipt] = asyncio.get_running_loop().create_future()
        self._loads.append((manifest, buffer, done))
        self._wake.set()
        return await done

    def pause(self, paused: bool) -> None:
        """Stop stepping, or go on; running rows keep their place."""
        self._paused = paused
        self._wake.set()

    @property
    def waiting(self) -> int:
        """Number of rows that have no slot yet."""
        return sum(len(rows) for _, rows in self._waiting)

    async def begin_term(self, context: StageContext) -> None:
        """Drop the rows of the term before, whose stages have ended, and work for `context` from now on."""
        await context.compute("generate.abort", self._engine.abort)  # after the step that runs
        self._context = context
        self._waiting.clear()
        self._running.clear()
        self._loads.clear()  # those who wait for one were refused with the old term
        self._followers.clear()

    async def run(self) -> None:
        """Load first, then generate, with one firing per lease. Runs for ever."""
        while True:
            if not self._paused:
                self._waits("weights" if self._waiting or self._engine.unfinished else "rows")
            await self._wake.wait()
            self._wake.clear()
            while self._loads or await self._startable():
                self._waits("lease")
                async with self._context.lease(f"{self._context.spec.name}.generate"):
                    self._waits("")
                    await self._install()
                    await self._fire()

    def _waits(self, what: str) -> None:
        for follower in self._followers:
            follower(what)

    def note_progress(self) -> None:
        """Report the tokens generated since the last report, also those of rows that have not finished."""
        self._report([])

    def _report(self, finished: list[int]) -> None:
        fresh, self._counted = self._engine.tokens - self._counted, self._engine.tokens
        if fresh or finished:
            self._context.exporter.inc("tokens_generated_total", fresh)
            self._context.reports.notify(Generated(finished, fresh))

    async def _startable(self) -> bool:
        if self._paused:
            return False
        if self._load_trained is not None and self._waiting:
            await self._context.compute("generate.follow", self._load_trained)
        return self._steppable or any(self._ready_rows(rows).any() for _, rows in self._waiting)

    @property
    def _steppable(self) -> bool:
        """Whether rows run under verified weights: an engine that refused a publication has none."""
        return self._engine.unfinished > 0 and self._engine.version is not None and not self._paused

    def _ready_rows(self, rows: Prompts) -> np.ndarray:
        version = self._engine.version
        if version is None or version.term < self._context.spec.term:  # weights of an abandoned lineage
            return np.zeros(len(rows), bool)
        return rows.min_versions <= version.step

    async def _fire(self) -> None:
        """Step until nothing runs. Alone on its devices, an engine also admits rows as slots become free."""
        await self._start_rows()
        while self._steppable:
            finished = await self._context.compute("generate", advance, self._engine, self._load_trained)
            reach(self._context.spec.name, "generating")
            self._give_finished(finished)
            if self._loads:
                await self._install()
            if not self._context.spec.leased:
                await self._start_rows()

    async def _start_rows(self) -> None:
        if self._paused:  # while the lease or a load was waited for
            return
        free = self._context.spec.slots - self._engine.unfinished
        for _ in range(len(self._waiting)):
            if self._context.spec.deterministic and self._engine.unfinished:
                return  # which rows run together decides the last bit: one job after the other
            job, rows = self._waiting.popleft()
            ready = np.flatnonzero(self._ready_rows(rows))
            if not self._context.spec.deterministic:
                ready = ready[: max(free, 0)]
            kept = np.setdiff1d(np.arange(len(rows)), ready)
            if len(kept):
                self._waiting.append((job, take(rows, kept)))
            if len(ready):
                free -= len(ready)
                await self._start(job, take(rows, ready))

    async def _start(self, job: Job, rows: Prompts) -> None:
        failures = await self._context.compute("generate.submit", submit_rows, self._engine, rows, job.sampling)
        refused = {f.sample_id for f in failures}  # a row that runs already is refused, and remains its first job's
        self._running |= {s: job for s in rows.sample_ids.tolist() if s not in refused}
        if failures:
            job.finish([], failures)

    def _give_finished(self, finished: list[FinishedRow]) -> None:
        by_job: dict[int, tuple[Job, list[FinishedRow]]] = {}
        for row in finished:
            job = self._running.pop(row.sample_id)
            by_job.setdefault(id(job), (job, []))[1].append(row)
        for job, rows in by_job.values():
            job.finish(rows, [])
        self._report([row.sample_id for row in finished])

    async def _install(self) -> None:
        settings = self._context.spec.settings
        assert isinstance(settings, ModelSettings)
        while self._loads:
            manifest, buffer, done = self._loads.popleft()
            reach(self._context.spec.name, "load")
            try:
                receipt = await self._context.compute("load", load, self._engine, manifest, buffer, settings.model)
            except BadWeights as error:
                self._context.log.error("version %s is refused: %s", manifest.version, error)
                if not done.cancelled():
                    done.set_exception(error)
                continue
            self._context.exporter.set("weights_version", manifest.version.step, replica="0")
            self._context.exporter.observe("weight_sync_seconds", receipt.seconds, phase="load")
            self._context.log.info(
                "version %s loaded: %d tensors, probe differs by %.2g, %.2f s",
                manifest.version,
                receipt.tensors,
                receipt.probe_difference,
                receipt.seconds,
            )
            if not done.cancelled():
                done.set_result(receipt)


def advance(engine: Engine, load_trained: Callable[[], None] | None) -> list[FinishedRow]:
    """Step until some rows finish, for a few steps at most: a load never waits for longer.

    An engine that shares the trained model first loads its newest version: there may have been an update.
    """
    for _ in range(STEPS_PER_TURN):
        if load_trained is not None:
            load_trained()
        if finished := engine.step():
            return finished
    return []


def load(engine: Engine, manifest: WeightManifest, buffer: Frame, model: Model) -> InstallReceipt:
    """Have an engine of `model` install what arrived. Raises BadWeights."""
    from workers.generation.packed import received  # brings torch, which only a service with an engine has

    return engine.load(received(manifest, buffer, model))


async def generate_now(
    loop: GenerationLoop, prompts: Prompts, sampling: Sampling
) -> tuple[Rollouts | None, list[Failure]]:
    """Generate rows outside the dataflow (evaluation, a client's call) and wait for all of them."""
    if not len(prompts):
        return None, []
    done: asyncio.Future[tuple[Rollouts | None, list[Failure]]] = asyncio.get_running_loop().create_future()

    def give(rollouts: Rollouts | None, failures: list[Failure]) -> None:
        if not done.done():
            done.set_result((rollouts, failures))

    loop.submit(Job(prompts, sampling, give, whole=True))
    return await done
