"""`asyncflow bench learning`: every recipe for addition as it is shipped, end to end, less its tests between the steps.

Each case is a run of its own through the public way to launch one, in this process and on one core: half a minute. A
finished case is a file; the benchmark goes on after the last one that is there, so it may be interrupted and started
again. Data and models are those that `asyncflow demo deploy/recipes/arithmetic` makes, and are made where they are not.

Staleness is reached, not simulated: prompts are admitted as far ahead as the bound allows and drawn at once, because
drawing a batch takes less than training one. So from step `bound` on, a batch is `bound` versions old; the table tells
the measured mean, which the first steps lower.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from asyncflow.bench.learning_table import END, Case, Result, cases
from asyncflow.client.run import Run
from asyncflow.recipe.config import BadInput, Recipe, load_recipe, nearest, recipe_text
from asyncflow.run.launch import launch

RECIPES = Path("deploy/recipes/arithmetic")


class Effort(msgspec.Struct, frozen=True):
    """How much is run: 0 as the recipes say, 60 steps of 256 samples."""

    steps: int = 0
    prompts_per_step: int = 0


QUICK = Effort(steps=2, prompts_per_step=4)


async def measure(
    algorithms: Sequence[str],
    seeds: int,
    bounds: Sequence[int],
    *,
    folder: Path,
    recipes: Path = RECIPES,
    effort: Effort = Effort(),  # noqa: B008 - frozen
    on_result: Callable[[Result], object] = lambda result: None,
) -> list[Result]:
    """The result of every case, each run unless it is there below `folder`. Raises BadInput for recipes that are none.

    Args:
        algorithms: names of recipes; () takes all of the folder.
        seeds: runs of each case.
        bounds: staleness in versions, see `learning_table.cases`.
        on_result: called with each result as soon as it is known.
    """
    from asyncflow.demo.prepare import prepare

    results: list[Result] = []
    wanted = cases(_known(recipes, algorithms), seeds, bounds)
    await asyncio.to_thread(prepare, recipes, Console(stderr=True))
    for case in wanted:
        results.append(await result_of(case, folder, recipe_of(case, recipes, effort)))
        on_result(results[-1])
    return results


def _known(recipes: Path, algorithms: Sequence[str]) -> list[str]:
    there = sorted(path.stem for path in recipes.glob("*.toml") if "\nalgorithm" in path.read_text("utf-8"))
    if not there:
        raise BadInput(f"bench learning: no recipes in {recipes}")
    for name in algorithms:
        if name not in there:
            raise BadInput(f"bench learning: no recipe {recipes / name}.toml{nearest(name, there)}")
    return list(algorithms) or there


def recipe_of(case: Case, recipes: Path, effort: Effort) -> Recipe:
    """The algorithm's recipe with a test before and after and none between."""
    less = [f"{name}={value}" for name in ("steps", "prompts_per_step") if (value := getattr(effort, name))]
    return load_recipe(
        recipes / f"{case.algorithm}.toml", ["evaluation.every=0", "checkpoints.every=0", *less, *case.overrides]
    )


async def result_of(case: Case, folder: Path, recipe: Recipe) -> Result:
    """The result that is there, or that of a run from the beginning. A run that failed is tried again."""
    digest = hashlib.sha256(recipe_text(recipe).encode()).hexdigest()
    kept = folder / "results" / f"{case.name}.json"
    if kept.exists():
        result = msgspec.json.decode(kept.read_bytes(), type=Result)
        if result.recipe == digest and not result.error:
            return result
    run_folder = folder / "runs" / case.name
    await asyncio.to_thread(shutil.rmtree, run_folder, ignore_errors=True)  # what an interrupted one left
    async with launch(recipe, folder=run_folder) as run:
        ended = await run.wait()
    error = "" if ended.outcome == "finished" else ended.error or ended.outcome
    result = _read(case, digest, error, run, recipe)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    part.replace(kept)
    return result


def _read(case: Case, digest: str, error: str, run: Run, recipe: Recipe) -> Result:
    """What the events of a run say of it; 0 where it did not come so far."""
    steps, scores = run.metrics, [evaluated.value for evaluated in run.evaluations]
    return Result(
        case=case,
        recipe=digest,
        error=error,
        before=scores[0] if scores else 0.0,
        after=scores[-1] if scores else 0.0,
        reward_first=_mean(step.reward_mean for step in steps[:END]),
        reward_last=_mean(step.reward_mean for step in steps[-END:]),
        staleness_mean=_mean(step.staleness_mean for step in steps),
        staleness_max=max((step.staleness_max for step in steps), default=0),
        steps=len(steps),
        samples=sum(step.samples for step in steps),
        seconds=sum(step.seconds for step in steps),
        correction=recipe.loss.correction,
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else 0.0
