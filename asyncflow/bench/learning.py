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
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from asyncflow.bench.learning_table import Case, LearningResult, cases, measured
from asyncflow.bench.recipe_runs import END, recipe_of, run_to_end
from asyncflow.bench.report import Measured
from asyncflow.client.run import Run
from asyncflow.demo.prepare import prepare
from asyncflow.recipe.config import BadInput, Recipe, nearest, recipe_text

RECIPES = Path("deploy/recipes/arithmetic")
QUICK = ("steps=2", "prompts_per_step=4")  # by default the recipes' own 60 steps of 256 samples


def run(*, quick: bool, algorithms: str, seeds: int, staleness: str, folder: Path) -> Measured:
    """The benchmark, as the command line runs it. Raises BadInput for a staleness bound that is not a number."""
    names, bounds = ([word for word in text.split(",") if word] for text in (algorithms, staleness))
    if bad := [bound for bound in bounds if not bound.isdecimal()]:
        raise BadInput(f"--staleness {staleness!r}: {bad[0]!r} is not a number of versions; write e.g. 0,2,4")
    if quick:
        folder /= "quick"
    return measured(
        uvloop.run(measure(names, seeds, [int(b) for b in bounds], folder=folder, overrides=QUICK if quick else ()))
    )


async def measure(
    algorithms: Sequence[str],
    seeds: int,
    bounds: Sequence[int],
    *,
    folder: Path,
    recipes: Path = RECIPES,
    overrides: Sequence[str] = (),
) -> list[LearningResult]:
    """The result of every case, run unless its file exists below `folder`. Raises BadInput for an unusable recipe.

    Args:
        algorithms: names of recipes; () takes all in the folder.
        seeds: number of runs of each case.
        bounds: staleness in versions, see `learning_table.cases`.
        overrides: of every recipe, e.g. fewer steps.
    """
    err = Console(stderr=True, highlight=False)
    results: list[LearningResult] = []
    wanted = cases(_known(recipes, algorithms), seeds, bounds)
    await asyncio.to_thread(prepare, recipes, err)
    for case in wanted:
        recipe = recipe_of(recipes / f"{case.algorithm}.toml", [*overrides, *case.overrides])
        result = await result_of(case, folder, recipe)
        err.print(f"{case.name}: {result.before:.3f} -> {result.after:.3f}, {result.seconds:.0f} s {result.error}")
        results.append(result)
    return results


def _known(recipes: Path, algorithms: Sequence[str]) -> list[str]:
    there = sorted(path.stem for path in recipes.glob("*.toml") if "\nalgorithm" in path.read_text("utf-8"))
    if not there:
        raise BadInput(f"bench learning: no recipes in {recipes}")
    for name in algorithms:
        if name not in there:
            raise BadInput(f"bench learning: no recipe {recipes / name}.toml{nearest(name, there)}")
    return list(algorithms) or there


async def result_of(case: Case, folder: Path, recipe: Recipe) -> LearningResult:
    """The stored result, or else the result of a new run. A failed run is tried again."""
    digest = hashlib.sha256(recipe_text(recipe).encode()).hexdigest()
    stored = folder / "results" / f"{case.name}.json"
    if stored.exists():
        result = msgspec.json.decode(stored.read_bytes(), type=LearningResult)
        if result.recipe == digest and not result.error:
            return result
    run, ended = await run_to_end(recipe, folder / "runs" / case.name)
    error = "" if ended.outcome == "finished" else ended.error or ended.outcome
    result = _read(case, digest, error, run, recipe)
    stored.parent.mkdir(parents=True, exist_ok=True)
    part = stored.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    part.replace(stored)
    return result


def _read(case: Case, digest: str, error: str, run: Run, recipe: Recipe) -> LearningResult:
    """A run's result from its events; 0 for what it did not reach."""
    steps, curve = run.metrics, [evaluated.metric for evaluated in run.evaluations][:1]
    scores = [evaluated.value for evaluated in run.evaluations if evaluated.metric in curve]
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
