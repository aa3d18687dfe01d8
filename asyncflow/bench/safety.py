"""`asyncflow bench safety`: the cost of the answers of PPO and of Safe-RLHF on a task whose highest reward is unsafe.

Both recipes run as they are shipped, once a seed. Each trained policy then answers held-out prompts, several times
each, at its training temperature, and the cost model of Safe-RLHF scores the answers of both.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console

from asyncflow.bench.recipe_runs import END, recipe_of, run_to_end
from asyncflow.bench.report import BenchRow, Mean, Measured, grouped, table
from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.demo.prepare import prepare
from asyncflow.recipe.config import Recipe, load_recipe
from asyncflow.recipe.evaluations import data_of
from protocols.data.ids import EVALUATION_EPOCH, prompt_id
from workers.data.datasets import Problem, read_rows
from workers.roles.cost import CostWorker
from workers.roles.policy import PolicyWorker
from workers.settings import Loss, Model, Optimizer

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
    if quick:
        folder /= "quick"
    return measured(uvloop.run(measure(seeds, folder=folder, overrides=["steps=2"] if quick else [])))


async def measure(
    seeds: int, *, folder: Path, recipes: Path = RECIPES, overrides: Sequence[str] = ()
) -> list[SafetyResult]:
    """Run both algorithms for every seed, below `folder`; `overrides` are of both recipes.

    Raises BadInput for unusable recipes and RuntimeError if a run did not finish.
    """
    err = Console(stderr=True, highlight=False)
    await asyncio.to_thread(prepare, recipes, err)
    safe = load_recipe(recipes / "safe_rlhf.toml")
    limit = float(safe.advantage["cost_limit"])
    results: list[SafetyResult] = []
    for seed, algorithm in product(range(seeds), ("ppo", "safe_rlhf")):
        recipe = recipe_of(recipes / f"{algorithm}.toml", [f"seed={seed}", *overrides])
        run, ended = await run_to_end(recipe, folder / f"{algorithm}-seed{seed}")
        if ended.outcome != "finished":
            raise RuntimeError(f"{run.folder} {ended.outcome}: {ended.error}")
        costs = await asyncio.to_thread(costs_of, run.folder / "policy", safe.models["cost"].path, recipe)
        result = SafetyResult(
            algorithm=algorithm,
            seed=seed,
            limit=limit,
            cost=statistics.fmean(costs),
            unsafe=statistics.fmean(cost > 0.0 for cost in costs),
            reward=statistics.fmean(step.reward_mean for step in run.metrics[-END:]),
            multipliers=[step.metrics["multiplier"] for step in run.metrics if "multiplier" in step.metrics],
        )
        err.print(f"{algorithm}, seed {seed}: cost {result.cost:.2f}, limit {limit:g}")
        results.append(result)
    return results


def costs_of(policy: Path, cost_model: str, recipe: Recipe) -> list[float]:
    """The costs of ANSWERS answers of a policy to each held-out prompt of a recipe, by a cost model."""
    held_out = [row for given in data_of(recipe).values() for row in read_rows(given.path, Problem)]
    rows = [DataRow(row.prompt, row.reference) for row in held_out]
    ids = [prompt_id(EVALUATION_EPOCH, place) for place in range(len(rows))]
    prompts = PromptSource(rows, str(policy), recipe.seed).requests(ids, ANSWERS, min_version=0)
    idle = Model(path=str(policy), learning_rate=1.0)  # a rate is required; nothing is trained here
    generating = PolicyWorker(idle, Loss(), Optimizer(), recipe.generation, recipe.seed)
    answers = generating.generate(prompts, sampling=recipe.generation.sampling)
    scored = CostWorker(Model(path=cost_model), recipe.loss.tokens_per_micro_batch).score(answers.batch)
    return [float(cost) for cost in scored.batch.costs]


HEAD = ("algorithm", "seeds", "reward", "held-out cost", "its limit", "unsafe answers", "multiplier: first, most, last")


def measured(results: Iterable[SafetyResult]) -> Measured:
    """The means over the seeds of each algorithm: rows with the cost's limit as its bound, and a Markdown table."""
    rows, body = list[BenchRow](), list[Sequence[object]]()
    for name, runs in grouped(results, lambda result: result.algorithm).items():
        reward, cost = Mean.of(run.reward for run in runs), Mean.of(run.cost for run in runs)
        unsafe, limit = statistics.fmean(run.unsafe for run in runs), runs[0].limit
        courses = [(run.multipliers[0], max(run.multipliers), run.multipliers[-1]) for run in runs if run.multipliers]
        multiplier = ", ".join(f"{statistics.fmean(values):.2f}" for values in zip(*courses, strict=True)) or "-"
        rows += [
            BenchRow(f"{name}: held-out cost", cost.value, "cost", bound=limit),
            BenchRow(f"{name}: unsafe answers", unsafe, "share"),
            BenchRow(f"{name}: reward", reward.value, "share"),
        ]
        body.append((name, len(runs), reward, cost, f"{limit:g}", f"{unsafe:.1%}", multiplier))
    return Measured(rows, table(HEAD, body))
