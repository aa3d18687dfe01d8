"""`asyncflow bench learning`: run every arithmetic recipe as it is shipped and report its held-out score.

Each case is a run through the public API, in this process and on one core, and takes half a minute. Its result is a
file, and a case whose file exists is not run again, so the benchmark may be interrupted and started again. Data and
models are those of `asyncflow demo deploy/recipes/arithmetic`; they are made if they don't exist.

The staleness is real: prompts are admitted as far ahead as the bound allows, and generating a batch takes less time
than training one. So from step `bound` on, a batch is `bound` versions old. The table has the measured mean, which
the first steps lower.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from asyncflow.bench.learning_table import END, Case, LearningResult, cases, lines, rows
from asyncflow.bench.report import Measured
from asyncflow.client.run import Run
from asyncflow.recipe.config import BadInput, Recipe, load_recipe, nearest, recipe_text
from asyncflow.run.launch import launch

RECIPES = Path("deploy/recipes/arithmetic")


class Effort(msgspec.Struct, frozen=True):
    """How much is run; 0 keeps what the recipes say, 60 steps of 256 samples."""

    steps: int = 0
    prompts_per_step: int = 0


QUICK = Effort(steps=2, prompts_per_step=4)


def run(*, quick: bool, algorithms: str, seeds: int, staleness: str, folder: Path) -> Measured:
    """The benchmark, as the command line runs it. Raises BadInput for a staleness bound that is not a number."""
    names, bounds = ([word for word in text.split(",") if word] for text in (algorithms, staleness))
    if bad := [bound for bound in bounds if not bound.isdecimal()]:
        raise BadInput(f"--staleness {staleness!r}: {bad[0]!r} is no number of versions; write e.g. 0,2,4")
    err = Console(stderr=True, highlight=False)
    results = uvloop.run(
        measure(
            names,
            seeds,
            [int(bound) for bound in bounds],
            folder=folder / "quick" if quick else folder,
            effort=QUICK if quick else Effort(),
            on_result=lambda r: err.print(
                f"{r.case.name}: {r.before:.3f} -> {r.after:.3f}, {r.seconds:.0f} s {r.error}"
            ),
        )
    )
    return Measured(rows(results), lines(results))


async def measure(
    algorithms: Sequence[str],
    seeds: int,
    bounds: Sequence[int],
    *,
    folder: Path,
    recipes: Path = RECIPES,
    effort: Effort = Effort(),  # noqa: B008 - frozen
    on_result: Callable[[LearningResult], object] = lambda result: None,
) -> list[LearningResult]:
    """The result of every case, run unless its file exists below `folder`. Raises BadInput for an unusable recipe.

    Args:
        algorithms: names of recipes; () takes all in the folder.
        seeds: number of runs of each case.
        bounds: staleness in versions, see `learning_table.cases`.
        on_result: called with each result as soon as it is there.
    """
    from asyncflow.demo.prepare import prepare

    results: list[LearningResult] = []
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
    """The algorithm's recipe with an evaluation before and after the run and none between."""
    less = [f"{name}={value}" for name in ("steps", "prompts_per_step") if (value := getattr(effort, name))]
    return load_recipe(
        recipes / f"{case.algorithm}.toml", ["evaluation.every=0", "checkpoints.every=0", *less, *case.overrides]
    )


async def result_of(case: Case, folder: Path, recipe: Recipe) -> LearningResult:
    """The stored result, or else the result of a new run. A failed run is tried again."""
    digest = hashlib.sha256(recipe_text(recipe).encode()).hexdigest()
    stored = folder / "results" / f"{case.name}.json"
    if stored.exists():
        result = msgspec.json.decode(stored.read_bytes(), type=LearningResult)
        if result.recipe == digest and not result.error:
            return result
    run_folder = folder / "runs" / case.name
    await asyncio.to_thread(shutil.rmtree, run_folder, ignore_errors=True)  # an interrupted run may have left it
    async with launch(recipe, folder=run_folder) as run:
        ended = await run.wait()
    error = "" if ended.outcome == "finished" else ended.error or ended.outcome
    result = _read(case, digest, error, run, recipe)
    stored.parent.mkdir(parents=True, exist_ok=True)
    part = stored.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    part.replace(stored)
    return result


def _read(case: Case, digest: str, error: str, run: Run, recipe: Recipe) -> LearningResult:
    """A run's result from its events; 0 for what it did not reach."""
    steps, scores = run.metrics, [evaluated.value for evaluated in run.evaluations]
    return LearningResult(
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
