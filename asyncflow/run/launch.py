"""The composition root: recipe -> checked recipe -> services -> controller -> Run.

No other module chooses implementations.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.client.run import Run
from asyncflow.client.starting_run import StartingRun
from asyncflow.control.client_requests import ClientRequests
from asyncflow.control.controller import Controller
from asyncflow.control.store.run_log import RunLog
from asyncflow.control.user_code import UserCode
from asyncflow.observe.exporter import Exporter, write_targets
from asyncflow.observe.log import close_log
from asyncflow.observe.trackers.tracking import Tracking
from asyncflow.planner.calibration.calibration import read_calibration
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.config import Recipe, load_recipe, to_recipe
from asyncflow.recipe.rule_reloads import check_reloaded_rules
from asyncflow.recipe.service_specs import (
    compose,
    stateful,
    user_modules,
)
from asyncflow.run import run_folder
from asyncflow.run.local_link import LocalLink
from asyncflow.run.prepare import prepare
from asyncflow.run.run_terms import CONTROLLER, RunTerms, restore
from asyncflow.run.start_progress import StartProgress
from asyncflow.services.channels.endpoint import ServiceError
from asyncflow.services.runtime import Runtime, Started
from protocols.control.events import RunStarted, Warned

_program_log = logging.getLogger("asyncflow")


def launch(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    folder: str | Path | None = None,
    allow_fresh: bool = False,
    progress: StartProgress | None = None,
) -> StartingRun:
    """Start a run: `async with launch(...) as run:` ends it with the block, `run = await launch(...)` keeps it.

    Args:
        recipe: a recipe, the path of one, or a table with the keys of one.
        folder: the run's folder; by default a new one below the recipe's `folder`. If it holds a run already, that run
            goes on: from its newest valid checkpoint, with this recipe, see `resume`. So a program that is started
            again may always make the same call.
        allow_fresh: see `resume`.
        progress: is told how far the start is.

    Raises:
        BadInput: before a model loads, for anything wrong with the recipe or its files.
        ServiceError: a service did not start; the message names it and its log.
    """
    return StartingRun(_launched(recipe, folder, allow_fresh, progress or StartProgress()))


@asynccontextmanager
async def _launched(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    folder: str | Path | None,
    allow_fresh: bool,
    progress: StartProgress,
) -> AsyncIterator[Run]:
    if isinstance(recipe, Mapping):
        recipe = to_recipe(recipe)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    given = run_folder.absolute(folder) if folder is not None else None
    goes_on = given is not None and run_folder.holds_run(given)
    if given is not None and goes_on and recipe.placed_by:  # the run has been placed
        before = run_folder.recipe_of(given)
        recipe = msgspec.structs.replace(recipe, placed_by="", pools=before.pools, placement=before.placement)
    checked = await asyncio.to_thread(prepare, recipe)
    path = given or run_folder.new_folder(checked.recipe)
    async with _started(checked, path, progress, goes_on=goes_on, allow_fresh=allow_fresh) as run:
        yield run


def resume(
    folder: str | Path,
    *,
    overrides: Iterable[str] = (),
    allow_fresh: bool = False,
    progress: StartProgress | None = None,
) -> StartingRun:
    """Continue a stopped or killed run from its newest valid checkpoint, or from step 0 before its first one.

    Args:
        folder: the run's folder.
        overrides: `key=value` of keys that a resumed run may change (asyncflow.recipe.changes), e.g. "steps=500".
        allow_fresh: start from step 0 also where all checkpoints are damaged or gone.
        progress: is told how far the start is.

    It is entered or awaited as `launch` is, and raises what `launch` raises.
    """
    return StartingRun(_resumed(folder, overrides, allow_fresh, progress or StartProgress()))


@asynccontextmanager
async def _resumed(
    folder: str | Path, overrides: Iterable[str], allow_fresh: bool, progress: StartProgress
) -> AsyncIterator[Run]:
    path = run_folder.absolute(folder)
    checked = await asyncio.to_thread(prepare, run_folder.recipe_of(path, overrides))
    async with _started(checked, path, progress, goes_on=True, allow_fresh=allow_fresh) as run:
        yield run


@asynccontextmanager
async def _started(
    checked: Checked, path: Path, progress: StartProgress, *, goes_on: bool, allow_fresh: bool
) -> AsyncIterator[Run]:
    with run_folder.locked(path):
        with run_folder.writing(path):
            if goes_on:
                progress.enter("verifies the newest checkpoint")
                # In a thread, because it hashes every byte of a checkpoint and Ctrl-C must work meanwhile.
                begin = partial(run_folder.begin_resumed, path, checked.recipe, allow_fresh=allow_fresh)
                start = await asyncio.to_thread(begin)
            else:
                start = run_folder.begin_fresh(path, checked.recipe)
            if checked.plan:
                (path / "plan.toml").write_text(checked.plan)
        async with _running(checked, path, start, progress) as run:
            yield run


@asynccontextmanager
async def _running(
    checked: Checked, folder: Path, start: run_folder.Start, progress: StartProgress
) -> AsyncIterator[Run]:
    recipe, dataflow = checked.recipe, checked.dataflow
    log = run_folder.open_controller_log(folder)
    runtime = runtime_of(recipe, partial(_tell, log))
    exporter = Exporter(CONTROLLER)
    trackers = Tracking(recipe.observe, folder, msgspec.to_builtins(recipe), exporter)
    # Before services import it: no change is missed.
    code = UserCode(user_modules(recipe, dataflow), partial(check_reloaded_rules, checked))
    try:
        progress.enter("starts Ray and loads models" if recipe.runtime == "ray" else "loads models", runtime.loads)
        services = await _start(checked, folder, start, runtime, log)
        exporter.set("staleness_bound_versions", recipe.staleness)
        with run_folder.writing(folder):
            requests, run_log = ClientRequests(), RunLog(folder, exporter, log)
            terms = RunTerms(checked, folder, runtime, services, code, requests, run_log, exporter.serve())
            first = terms.open(start)
        started = RunStarted(
            run=folder.name,
            folder=str(folder),
            steps=recipe.steps,
            first_step=first.version,
            term=start.term,
            services=list(services),
            warnings=[*checked.notes, *start.warnings, *runtime.warnings],
        )
        controller = Controller(first, terms, terms.policy, requests, run_log, started)
        task = asyncio.create_task(controller.run(), name=f"controller of {folder.name}")
        trackers.follow(
            controller.events.follow(controller.events.start),
            lambda text: run_log.emit(Warned(step=controller.version, text=text)),
        )
        link = LocalLink(controller, task, checked, services, runtime.store)
        try:
            yield Run(link, folder.name, folder, controller.events.start)
        except asyncio.CancelledError:  # end without draining; a resume uses the last checkpoint
            task.cancel()
            raise
        finally:
            controller.stop()
            try:
                await asyncio.gather(task, return_exceptions=True)
            finally:
                services.clear()  # for clients that still read or answer
    finally:
        await runtime.stop()
        for lacking in await trackers.close():
            log.warning("%s", lacking)
        await asyncio.to_thread(exporter.close)
        with contextlib.suppress(OSError):  # a full disk: a scrape then reports the ended run as down
            write_targets(folder / "metrics" / "targets.json", [])
        close_log(log)


async def _start(
    checked: Checked, folder: Path, start: run_folder.Start, runtime: Runtime, log: logging.Logger
) -> dict[str, Started]:
    """Start the services and restore their state. What goes wrong stands in the log, too."""
    specs = compose(checked.recipe, checked.dataflow, folder.name, start.term, str(folder / "logs"))
    log.info("starts %s on the %s runtime", ", ".join(spec.name for spec in specs), checked.recipe.runtime)
    try:
        services = await runtime.start(specs)
        await restore(services, stateful(checked.dataflow), start.restore)
    except ServiceError as error:
        log.error("the run did not start: %s", error)
        raise
    return services


def _tell(log: logging.Logger, text: str) -> None:
    """Say something in the run's log, and at once to the program: on standard error where it configures no logging."""
    log.warning(text)
    _program_log.warning(text)


def runtime_of(recipe: Recipe, tell: Callable[[str], None] = _program_log.warning) -> Runtime:
    """The runtime of a recipe, not started. `tell` gets what its start has to wait for."""
    if recipe.runtime == "local":
        from asyncflow.services.runtime.local import LocalRuntime

        return LocalRuntime(recipe.store_bytes)
    from asyncflow.services.runtime.pools import PoolRequest
    from asyncflow.services.runtime.ray import RayRuntime

    pools = {  # a calibration file is replaced by the device that it measured
        name: PoolRequest(pool.devices, pool.device and read_calibration(pool.device).device.name)
        for name, pool in recipe.pools.items()
    }
    store_bytes = recipe.store_bytes
    return RayRuntime(recipe.inline_bytes, recipe.ray_address, store_bytes=store_bytes, pools=pools, tell=tell)
