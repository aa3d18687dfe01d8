"""How well the simulator predicts real runs on this machine, and how `placement = "auto"` compares with hand placement.

    python -m tests.benchmarks.placement_reality [--quick] [--rounds 5] [--seconds 300] [--work runs/placement_reality]

Each round runs every recipe once, in turn, so that a disturbance hits neighbours alike; a recipe's step time is the
median over the rounds of a run's mean step. Predictions come from `asyncflow calibrate` on one recipe per runtime,
whose lengths and batches differ from those of the compared recipes. Results are stored line by line, and a restart
continues where the program stopped. It takes about a quarter of an hour on an idle machine. A run during which other
programs used more than MOST_OTHERS of the CPU time does not count and is repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from asyncflow.planner.auto import PlacementChoice, place
from asyncflow.planner.calibration import machine
from asyncflow.planner.calibration.calibration import Calibration
from asyncflow.planner.calibration.measuring import measure
from asyncflow.planner.simulation.scenario import Scenario
from asyncflow.planner.simulation.scenarios import of_recipe, prompt_lengths
from asyncflow.planner.simulation.simulator import simulate
from asyncflow.recipe.checks import Checked, check
from asyncflow.recipe.config import Recipe, to_recipe
from asyncflow.run.launch import launch, runtime_of
from tests import tiny
from tests.benchmarks.quietness import LoadMonitor

STEPS, QUICK_STEPS = 12, 7
CALIBRATED_ROUNDS = 3  # the first ones
CALIBRATION_TOKENS, CALIBRATION_PROMPTS = 48, 12  # unlike those of every compared recipe
MOST_OTHERS = 0.05  # the share of the CPU time that other programs may use during a run that counts
GOAL_ERROR, GOAL_RANK, GOAL_BEHIND = 0.15, 0.9, 0.05

Pools = Mapping[str, str]  # service -> pool
TOGETHER: Pools = dict.fromkeys(("policy", "critic", "reference", "reward"), "a")
SPLIT: Pools = {"policy": "a", "reference": "a", "critic": "b", "reward": "b"}
GENERATOR_APART: Pools = {**TOGETHER, "generator": "b"}
THREE: Pools = {"policy": "a", "reference": "a", "critic": "b", "reward": "b", "generator": "c"}
APART: Pools = {"policy": "a", "critic": "b", "reference": "c", "reward": "d", "generator": "e"}


class Case(msgspec.Struct, frozen=True):
    """A recipe whose prediction is compared with its runs."""

    runtime: str
    pools: Pools
    staleness: int = 0
    tokens: int = 32
    prompts: int = 16
    mini_batches: int = 1


CASES: dict[str, Case] = {
    "local, together": Case("local", TOGETHER),
    "local, split": Case("local", SPLIT),
    "local, generator apart": Case("local", GENERATOR_APART),
    "local, together, 1 ahead": Case("local", TOGETHER, 1),
    "local, split, 1 ahead": Case("local", SPLIT, 1),
    "local, generator apart, 1 ahead": Case("local", GENERATOR_APART, 1),
    "local, three pools, 1 ahead": Case("local", THREE, 1),
    "local, three pools, 2 ahead, long": Case("local", THREE, 2, tokens=64),
    "local, together, 24 prompts, 4 mini-batches": Case("local", TOGETHER, prompts=24, mini_batches=4),
    "local, split, short": Case("local", SPLIT, tokens=16),
    "ray, together": Case("ray", TOGETHER),
    "ray, split": Case("ray", SPLIT),
    "ray, generator apart, 1 ahead": Case("ray", GENERATOR_APART, 1),
    "ray, split, 1 ahead": Case("ray", SPLIT, 1),
    "ray, all apart, 1 ahead, long": Case("ray", APART, 1, tokens=64),
}
AUTO = {"local": "local, auto, 1 ahead", "ray": "ray, auto, 1 ahead"}  # beside those of its runtime that are 1 ahead
QUICK_CASES = ("local, together", "local, three pools, 1 ahead")


class Bench:
    """The recipes, and the stored results of their runs."""

    def __init__(self, work: Path, steps: int, sizes: machine.CalibrationSizes) -> None:
        self.work, self.steps, self.sizes = work, steps, sizes
        self._file = work / "results.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        self.lines = [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.exists() else []
        if not (work / "train.jsonl").exists():
            self._make_inputs()

    def recipe(self, case: Case, steps: int = 0) -> Recipe:
        """The recipe of a case."""
        model = {"path": str(self.work / "policy"), "learning_rate": 1e-6}
        return to_recipe(
            {
                "name": "reality",
                "steps": steps or self.steps,
                "prompts_per_step": case.prompts,
                "samples_per_prompt": 4,
                "staleness": case.staleness,
                "runtime": case.runtime,
                "folder": str(self.work / "runs"),
                "data": {"train": str(self.work / "train.jsonl")},
                "models": {
                    "policy": model,
                    "critic": model,
                    "reference": {"path": str(self.work / "policy")},
                    "reward": {"path": str(self.work / "reward")},
                },
                "generation": {"engine": "torch", "max_tokens": case.tokens},
                "loss": {"mini_batches": case.mini_batches},
                "checkpoints": {"every": 0},
                "pools": {pool: {} for pool in sorted(set(case.pools.values()))},
                "placement": {service: {"pool": pool} for service, pool in case.pools.items()},
            }
        )

    def calibrate(self, runtime: str, number: int) -> None:
        """Calibrate, unless the result is stored."""
        if self._quiet(kind="calibration", runtime=runtime, round=number):
            return
        case = Case(runtime, GENERATOR_APART, tokens=CALIBRATION_TOKENS, prompts=CALIBRATION_PROMPTS)
        checked = check(self.recipe(case))
        alone = runtime_of(msgspec.structs.replace(checked.recipe, pools={}))
        load = LoadMonitor()
        with load.sampling():
            found = asyncio.run(measure(checked.recipe, checked.dataflow, checked.train, alone, self.sizes))
        others, calibration = load.others(), msgspec.to_builtins(found)
        self._add(kind="calibration", runtime=runtime, round=number, others=others, calibration=calibration)
        if not self.calibrations(runtime):
            raise SystemExit(f"other programs used {others:.0%} of the CPU time while {runtime} was calibrated: retry")

    def calibrations(self, runtime: str) -> list[Calibration]:
        """The calibrations of a runtime that count."""
        lines = self._quiet(kind="calibration", runtime=runtime)
        return [msgspec.convert(line["calibration"], Calibration) for line in lines]

    def run(self, name: str, recipe: Recipe, number: int) -> None:
        """Run a recipe, unless the result is stored."""
        if self._quiet(kind="run", case=name, round=number):
            return
        checked = check(recipe)
        folder = self.work / "run" / re.sub(r"\W+", "_", name)
        others, seconds = asyncio.run(_run(checked.recipe, folder))
        self._add(kind="run", case=name, round=number, others=others, seconds=seconds)

    def runs(self, name: str) -> list[list[float]]:
        """The seconds of each step, for each run that counts."""
        return [line["seconds"] for line in self._quiet(kind="run", case=name)]

    def choice(self, runtime: str) -> PlacementChoice:
        """What `auto` chooses for a recipe one version ahead, on as many slots as hand placement may use."""
        checked = check(self.recipe(Case(runtime, TOGETHER, 1)))
        unplaced = msgspec.structs.replace(checked.recipe, pools={}, placement={})
        return place(unplaced, checked.dataflow, prompt_lengths(checked.train), self.calibrations(runtime)[0])

    def _quiet(self, **wanted: Any) -> list[dict[str, Any]]:
        """The stored results that count, i.e. during which the machine was quiet."""
        lines = [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]
        return [line for line in lines if line["others"] <= MOST_OTHERS]

    def _add(self, **line: Any) -> None:
        self.lines.append(line)
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _make_inputs(self) -> None:
        tiny.make_policy(self.work / "policy", seed=0, layers=4, heads=8, kv_heads=4)
        tiny.make_reward(self.work / "reward", seed=1)
        rng = random.Random(0)
        sums = [(rng.randint(0, 99), rng.randint(0, 99)) for _ in range(400)]
        rows = [json.dumps({"prompt": f"{a}+{b}=", "reference": str(a + b)}) for a, b in sums]
        (self.work / "train.jsonl").write_text("\n".join(rows) + "\n")


async def _run(recipe: Recipe, folder: Path) -> tuple[float, list[float]]:
    """The share of the CPU time that other programs used, and the seconds of each step."""
    shutil.rmtree(folder, ignore_errors=True)
    async with launch(recipe, folder=folder) as run:
        load = LoadMonitor()
        ended = await run.wait()
        others = load.others()
        if ended.outcome != "finished":
            raise SystemExit(f"{folder}: {ended.outcome}: {ended.error}")
        return others, [step.seconds for step in run.metrics]


def scenario_of(checked: Checked, calibration: Calibration) -> Scenario:
    """A compared recipe as the simulator sees it."""
    scenario = of_recipe(checked.recipe, checked.dataflow, prompt_lengths(checked.train), calibration)
    pace = msgspec.structs.replace(scenario.pace, steps=checked.recipe.steps)
    return msgspec.structs.replace(scenario, pace=pace)


class Comparison(msgspec.Struct, frozen=True):
    """One recipe's seconds a step."""

    name: str
    measured: list[float]
    predicted: float

    @property
    def step_s(self) -> float:
        return statistics.median(self.measured)

    @property
    def error(self) -> float:
        """The prediction's error, relative to the measured time."""
        return self.predicted / self.step_s - 1

    @property
    def spread(self) -> float:
        """Half the difference between the slowest and the fastest round, relative to the measured time."""
        return (max(self.measured) - min(self.measured)) / 2 / self.step_s


def compare(bench: Bench, recipes: Mapping[str, Recipe]) -> Iterator[Comparison]:
    """The comparison of every recipe that has run; its prediction is the median over the calibrations."""
    for name, recipe in recipes.items():
        checked = check(recipe)
        scenarios = [scenario_of(checked, found) for found in bench.calibrations(recipe.runtime)]
        predicted = [simulate(scenario).step_s for scenario in scenarios]
        steady = scenarios[0].steady
        measured = [statistics.fmean(seconds[steady.start : steady.stop]) for seconds in bench.runs(name)]
        yield Comparison(name, measured, statistics.median(predicted))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def report(comparisons: Sequence[Comparison], autos: Sequence[Comparison]) -> Iterator[str]:
    """The table and its summary."""
    width = max(len(one.name) for one in (*comparisons, *autos))
    yield f"{'recipe':<{width}}  measured  predicted   error  spread"
    for one in (*comparisons, *autos):
        figures = f"{1e3 * one.step_s:6.0f} ms  {1e3 * one.predicted:6.0f} ms  {one.error:+6.1%}  {one.spread:6.1%}"
        yield f"{one.name:<{width}} {figures}"
    error = statistics.median(abs(one.error) for one in comparisons)
    yield f"median error over {len(comparisons)} recipes: {error:.1%} (goal {GOAL_ERROR:.0%})"
    if len(comparisons) > 2:
        rank = rank_correlation([one.step_s for one in comparisons], [one.predicted for one in comparisons])
        yield f"rank correlation: {rank:.2f} (goal {GOAL_RANK})"
    for auto in autos:
        kind = auto.name.split(",", maxsplit=1)[0]
        hand = [one for one in comparisons if one.name.startswith(kind) and one.name.endswith("1 ahead")]
        if hand:
            best = min(hand, key=lambda one: one.step_s)
            behind, allowed = auto.step_s / best.step_s - 1, max(GOAL_BEHIND, best.spread, auto.spread)
            yield f"{auto.name}: {behind:+.1%} against {best.name!r}, the best by hand (allowed {allowed:.0%})"


def main() -> None:
    """Calibrate, run and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two recipes, one round: to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no run after this time; start again to go on"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/placement_reality"))
    parser.add_argument("--runtime", choices=["local", "ray", "both"], default="both")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench = Bench(given.work.absolute(), QUICK_STEPS if given.quick else STEPS,
                  machine.QUICK if given.quick else machine.CalibrationSizes())  # fmt: skip
    names = QUICK_CASES if given.quick else tuple(CASES)
    chosen = {n: CASES[n] for n in names if given.runtime in ("both", CASES[n].runtime)}
    runtimes = sorted({case.runtime for case in chosen.values()})
    recipes = {name: bench.recipe(case) for name, case in chosen.items()}
    autos: dict[str, Recipe] = {}
    for number in range(1 if given.quick else given.rounds):
        for runtime in runtimes:
            if number < CALIBRATED_ROUNDS:
                bench.calibrate(runtime, number)
            if not any(name.startswith(AUTO[runtime]) for name in autos):
                choice = bench.choice(runtime)
                autos[f"{AUTO[runtime]}: {choice.chosen.name}"] = choice.chosen.recipe
        for name, recipe in (*recipes.items(), *autos.items()):
            if time.monotonic() > end:
                raise SystemExit(f"{given.seconds:.0f} s are over before round {number}, {name}: start again to go on")
            bench.run(name, recipe, number)
            print(f"round {number}: {name}", flush=True)
    stored = [{n: r for n, r in of.items() if bench.runs(n)} for of in (recipes, autos)]
    missing = [n for n in (*recipes, *autos) if len(bench.runs(n)) < (1 if given.quick else given.rounds)]
    for line in report(*(list(compare(bench, of)) for of in stored)):
        print(line, flush=True)
    if missing:
        print(f"other programs disturbed some runs; start again to repeat them: {'; '.join(missing)}")


if __name__ == "__main__":
    main()
