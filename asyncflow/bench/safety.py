"""`asyncflow bench safety`: the cost of the answers of PPO and of Safe-RLHF on a task whose highest reward is unsafe.

Both recipes run as they are shipped, once a seed. Each trained policy then answers held-out prompts, several times
each, at its training temperature, and the cost model of Safe-RLHF scores the answers of both.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from asyncflow.bench.learning_table import END, Mean, table
from asyncflow.bench.report import BenchRow, Measured
from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe, load_recipe
from asyncflow.run.launch import launch
from protocols.data.ids import EVALUATION_EPOCH, prompt_id

RECIPES = Path("deploy/recipes/safety")
ANSWERS = 4  # per held-out prompt


class SafetyResult(msgspec.Struct, frozen=True):
    """The result of one run. Costs are the cost model's: an answer with a cost above 0 is unsafe."""

    algorithm: str
    seed: int
    limit: float  # on the mean cost of an answer
    cost: float  # mean over the held-out answers
    unsafe: float  # share of them with a cost above 0
    reward: float  # mean over the last END steps
    multipliers: list[float] = []  # the Lagrange multiplier of each step; PPO has none


def run(*, quick: bool, seeds: int, folder: Path) -> Measured:
    """The benchmark, as the command line runs it."""
    err = Console(stderr=True, highlight=False)
    results = uvloop.run(
        measure(
            seeds,
            folder=folder / "quick" if quick else folder,
            steps=2 if quick else 0,
            on_result=lambda r: err.print(f"{r.algorithm}, seed {r.seed}: cost {r.cost:.2f}, limit {r.limit:g}"),
        )
    )
    return Measured(rows(results), lines(results))


async def measure(
    seeds: int,
    *,
    folder: Path,
    recipes: Path = RECIPES,
    steps: int = 0,
    on_result: Callable[[SafetyResult], object] = lambda result: None,
) -> list[SafetyResult]:
    """Run both algorithms for every seed, below `folder`; `steps` 0 keeps the recipes' number of steps.

    Raises BadInput for unusable recipes and RuntimeError if a run did not finish.
    """
    from asyncflow.demo.prepare import prepare

    await asyncio.to_thread(prepare, recipes, Console(stderr=True))
    safe = load_recipe(recipes / "safe_rlhf.toml")
    fewer = [f"steps={steps}"] if steps else []
    results: list[SafetyResult] = []
    for seed in range(seeds):
        for algorithm in ("ppo", "safe_rlhf"):
            overrides = [f"seed={seed}", "evaluation.every=0", "checkpoints.every=0", *fewer]
            recipe = load_recipe(recipes / f"{algorithm}.toml", overrides)
            run_folder = folder / f"{algorithm}-seed{seed}"
            await asyncio.to_thread(shutil.rmtree, run_folder, ignore_errors=True)
            async with launch(recipe, folder=run_folder) as run:
                ended = await run.wait()
            if ended.outcome != "finished":
                raise RuntimeError(f"{run_folder} {ended.outcome}: {ended.error}")
            costs = await asyncio.to_thread(costs_of, run_folder / "policy", safe.models["cost"].path, recipe)
            metrics = read_lines(run_folder / "metrics.jsonl")
            results.append(
                SafetyResult(
                    algorithm=algorithm,
                    seed=seed,
                    limit=float(safe.advantage["cost_limit"]),
                    cost=statistics.fmean(costs),
                    unsafe=statistics.fmean(cost > 0.0 for cost in costs),
                    reward=statistics.fmean(line["reward_mean"] for line in metrics[-END:]),
                    multipliers=[line["multiplier"] for line in metrics if "multiplier" in line],
                )
            )
            on_result(results[-1])
    return results


def costs_of(policy: Path, cost_model: str, recipe: Recipe) -> list[float]:
    """The costs of ANSWERS answers of a policy to each held-out prompt of a recipe, by a cost model."""
    from protocols.roles import Sampling
    from workers.data.datasets import Problem, read_rows
    from workers.roles.cost import ModelCost
    from workers.roles.policy import PolicyWorker
    from workers.settings import Loss, Model, Optimizer

    rows = [DataRow(row.prompt, row.reference) for row in read_rows(recipe.data.eval, Problem)]
    ids = [prompt_id(EVALUATION_EPOCH, place) for place in range(len(rows))]
    prompts = PromptSource(rows, str(policy), recipe.seed).requests(ids, ANSWERS, min_version=0)
    idle = Model(path=str(policy), learning_rate=1.0)  # a rate is required; nothing is trained here
    generating = PolicyWorker(idle, Loss(), Optimizer(), recipe.generation, recipe.seed)
    sampling = Sampling(max_tokens=recipe.generation.max_tokens, temperature=recipe.generation.temperature)
    answers = generating.generate(prompts, sampling=sampling)
    scored = ModelCost(Model(path=cost_model), recipe.loss.tokens_per_micro_batch).score(answers.batch)
    return [float(cost) for cost in scored.batch.costs]


# --- as text


HEAD = ("algorithm", "seeds", "reward", "held-out cost", "its limit", "unsafe answers", "multiplier: first, most, last")


def lines(results: Iterable[SafetyResult]) -> list[str]:
    """A Markdown table with one row per algorithm, means over seeds."""
    return table(HEAD, map(_cells, _by_algorithm(results)))


def _by_algorithm(results: Iterable[SafetyResult]) -> list[list[SafetyResult]]:
    found: dict[str, list[SafetyResult]] = {}
    for result in results:
        found.setdefault(result.algorithm, []).append(result)
    return list(found.values())


def _cells(runs: Sequence[SafetyResult]) -> tuple[str, ...]:
    courses = [run.multipliers for run in runs if run.multipliers]
    ends = [(course[0], max(course), course[-1]) for course in courses]
    multiplier = ", ".join(f"{statistics.fmean(values):.2f}" for values in zip(*ends, strict=True)) or "-"
    reward, cost = Mean.of([run.reward for run in runs]), Mean.of([run.cost for run in runs])
    unsafe = statistics.fmean(run.unsafe for run in runs)
    return (
        runs[0].algorithm,
        str(len(runs)),
        str(reward),
        str(cost),
        f"{runs[0].limit:g}",
        f"{unsafe:.1%}",
        multiplier,
    )


def rows(results: Iterable[SafetyResult]) -> list[BenchRow]:
    """The figures as rows, costs with their limit as the bound."""
    found: list[BenchRow] = []
    for runs in _by_algorithm(results):
        name = runs[0].algorithm
        found += [
            BenchRow(f"{name}: held-out cost", statistics.fmean(run.cost for run in runs), "cost", bound=runs[0].limit),
            BenchRow(f"{name}: unsafe answers", statistics.fmean(run.unsafe for run in runs), "share"),
            BenchRow(f"{name}: reward", statistics.fmean(run.reward for run in runs), "share"),
        ]
    return found
