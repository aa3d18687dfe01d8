"""The composition root: recipe -> checked recipe -> services -> controller -> Run.

No other module chooses implementations.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from asyncflow.client.run import Run
from asyncflow.control.controller import Controller
from asyncflow.control.evaluation import Evaluator
from asyncflow.control.settings import Pace
from asyncflow.control.store.ledger import Ledger
from asyncflow.control.store.run_store import RunStore
from asyncflow.control.supervision.restart_policy import RestartPolicy
from asyncflow.control.supervision.service_supervisor import ServiceSupervisor
from asyncflow.control.user_code import UserCode
from asyncflow.observe.exporter import Exporter, ScrapeTarget, write_targets
from asyncflow.planner.calibration.calibration import read_calibration
from asyncflow.recipe.checks import Checked
from asyncflow.recipe.config import Recipe, load_recipe
from asyncflow.recipe.service_specs import (
    GENERATOR,
    NO_DEVICE,
    compose,
    pools_of,
    replaceable,
    services_of,
    stateful,
    user_modules,
)
from asyncflow.run import run_folder
from asyncflow.run.local_link import LocalLink
from asyncflow.run.prepare import prepare
from asyncflow.services.channels.endpoint import Endpoint, all_or_error, ask
from asyncflow.services.runtime import Runtime, Started
from protocols.control.requests import LoadState

if TYPE_CHECKING:
    from asyncflow.services.runtime.pools import PoolRequest

CONTROLLER = "controller"


@asynccontextmanager
async def launch(recipe: Recipe | str | Path, *, folder: str | Path | None = None) -> AsyncIterator[Run]:
    """Start a new run; leaving the block stops it and frees its resources.

    Args:
        recipe: a recipe, or the path of one.
        folder: the run's folder; by default a new one below the recipe's `folder`.

    Raises:
        BadInput: before a model loads, for anything wrong with the recipe or its files.
        ServiceError: a service did not start; the message names it and its log.
    """
    checked = await asyncio.to_thread(prepare, recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    path = Path(folder) if folder is not None else run_folder.new_folder(checked.recipe)
    with run_folder.locked(path):
        start = run_folder.begin_fresh(path, checked.recipe)
        if checked.plan:
            (path / "plan.toml").write_text(checked.plan)
        async with _running(checked, path, start) as run:
            yield run


@asynccontextmanager
async def resume(folder: str | Path, *, allow_fresh: bool = False) -> AsyncIterator[Run]:
    """Continue a stopped or killed run from its newest valid checkpoint. Raises what `launch` raises."""
    path = Path(folder)
    checked = await asyncio.to_thread(prepare, run_folder.recipe_of(path))
    with run_folder.locked(path):
        # In a thread, because it hashes every byte of a checkpoint and Ctrl-C must work meanwhile.
        start = await asyncio.to_thread(run_folder.begin_resumed, path, checked.recipe, allow_fresh=allow_fresh)
        async with _running(checked, path, start) as run:
            yield run


@asynccontextmanager
async def _running(checked: Checked, folder: Path, start: run_folder.Start) -> AsyncIterator[Run]:
    recipe = checked.recipe
    name = folder.name
    log = _log_to(folder / "logs" / f"{CONTROLLER}.log")
    specs = compose(recipe, checked.dataflow, name, start.term, str(folder / "logs"))
    runtime = runtime_of(recipe)
    exporter = Exporter(CONTROLLER)
    code = UserCode(user_modules(recipe, checked.dataflow))  # before services import it: no change is missed
    try:
        services = await runtime.start(specs)
        await _restore(services, stateful(checked.dataflow), start.restore)
        port = exporter.serve()
        _write_targets(folder, name, services, port)
        controller = _controller(checked, folder, start, runtime, services, code, exporter, port)
        task = asyncio.create_task(controller.run(), name=f"controller of {name}")
        link = LocalLink(controller, task, checked, services, runtime.store)
        try:
            yield Run(link, name, folder)
        except asyncio.CancelledError:  # end without draining; a resume uses the last checkpoint
            task.cancel()
            raise
        finally:
            controller.stop()
            try:
                await asyncio.gather(task, return_exceptions=True)
            finally:
                link.close()
    finally:
        await runtime.stop()
        await asyncio.to_thread(exporter.close)
        write_targets(folder / "metrics" / "targets.json", [])  # else a scrape would report the ended run as down
        logging.getLogger("asyncflow").removeHandler(log)
        log.close()


def _controller(
    checked: Checked,
    folder: Path,
    start: run_folder.Start,
    runtime: Runtime,
    services: dict[str, Started],
    code: UserCode,
    exporter: Exporter,
    port: int,
) -> Controller:
    recipe, dataflow = checked.recipe, checked.dataflow

    async def restart(name: str) -> Endpoint:
        services[name] = await runtime.restart(name)
        await code.give_running(services[name].endpoint)
        _write_targets(folder, folder.name, services, port)
        return services[name].endpoint

    run_store = RunStore(
        run=folder.name,
        folder=folder,
        term=start.term,
        ledger=Ledger(folder / "ledger.db"),
        checkpoints=recipe.checkpoints,
        stateful=stateful(dataflow),
        recipe_digest=run_folder.digest_of(recipe),
        exporter=exporter,
        staleness=recipe.staleness,
        restored=start.restore,
    )
    pace = Pace(
        steps=recipe.steps,
        prompts_per_step=recipe.prompts_per_step,
        samples_per_prompt=recipe.samples_per_prompt,
        staleness=recipe.staleness,
        deterministic=recipe.deterministic,
        max_refills=recipe.max_refills,
    )
    evaluator = None
    if checked.heldout is not None:
        evaluator = Evaluator(
            checked.heldout,
            runtime.store,
            recipe.evaluation.metric,
            recipe.generation.max_tokens,
            recipe.evaluation.limit,
        )
    return Controller(
        pace=pace,
        deadlines=recipe.deadlines,
        dataflow=dataflow,
        supervisor=ServiceSupervisor(
            {n: s.endpoint for n, s in services.items()},
            {s: p for s, p in pools_of(recipe, dataflow).items() if p != NO_DEVICE},
            RestartPolicy(dataflow, services_of(recipe, dataflow), replaceable(recipe), recipe.failures.restarts),
            restart,
        ),
        generators=[GENERATOR if GENERATOR in services else "policy"],
        store=runtime.store,
        source=checked.train,
        evaluator=evaluator,
        evaluation=recipe.evaluation,
        run_store=run_store,
        warnings=start.warnings,
        code=code,
    )


async def _restore(services: dict[str, Started], names: list[str], checkpoint: str) -> None:
    if checkpoint:
        async with all_or_error() as group:
            for name in names:
                group.create_task(
                    ask(services[name].endpoint, LoadState(f"{checkpoint}/{name}")), name=f"restore {name}"
                )


def runtime_of(recipe: Recipe) -> Runtime:
    """The runtime of a recipe, not started."""
    if recipe.runtime == "local":
        from asyncflow.services.runtime.local import LocalRuntime

        return LocalRuntime(recipe.store_bytes)
    from asyncflow.services.runtime.ray import RayRuntime

    pools = pool_requests(recipe)
    return RayRuntime(recipe.inline_bytes, recipe.ray_address, store_bytes=recipe.store_bytes, pools=pools)


def pool_requests(recipe: Recipe) -> dict[str, PoolRequest]:
    """What the runtime reserves for a recipe's pools. A calibration file is replaced by the device that it measured."""
    from asyncflow.services.runtime.pools import PoolRequest

    named = {name: pool.device and read_calibration(pool.device).device.name for name, pool in recipe.pools.items()}
    return {name: PoolRequest(pool.devices, named[name]) for name, pool in recipe.pools.items()}


def _write_targets(folder: Path, run: str, services: dict[str, Started], port: int) -> None:
    targets = [ScrapeTarget(address=s.address, role=n, rank=0, run=run) for n, s in services.items()]
    targets.append(ScrapeTarget(address=f"127.0.0.1:{port}", role=CONTROLLER, rank=0, run=run))
    write_targets(folder / "metrics" / "targets.json", targets)


def _log_to(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("asyncflow")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    return handler
