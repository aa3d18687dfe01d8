"""The cases of the learning benchmark, and the tables of their results. Pure: from results to text.

The tables answer two questions. Does every recipe raise its held-out score, whatever the seed? And what does staleness
cost, with the recipe's off-policy correction at each bound, and without it at the largest bound?
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from asyncflow.bench.report import BenchRow, Mean, Measured, grouped, table

STALE = ("grpo", "ppo")  # staleness is compared for one algorithm without a critic and one with a critic


class Case(msgspec.Struct, frozen=True):
    """One run."""

    algorithm: str
    seed: int
    staleness: int | None = None  # versions; None: the recipe's own
    corrected: bool = True  # False: loss.correction = "none"

    @property
    def kind(self) -> Case:
        """The case without its seed: results are averaged over seeds."""
        return msgspec.structs.replace(self, seed=0)

    @property
    def name(self) -> str:
        """Its name in file names: `grpo-staleness4-uncorrected-seed1`."""
        stale = "" if self.staleness is None else f"-staleness{self.staleness}"
        return f"{self.algorithm}{stale}{'' if self.corrected else '-uncorrected'}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """The overrides of its algorithm's recipe."""
        stale = [] if self.staleness is None else [f"staleness={self.staleness}"]
        return [f"seed={self.seed}", *stale, *([] if self.corrected else ["loss.correction=none"])]


class LearningResult(msgspec.Struct, frozen=True):
    """The result of one run."""

    case: Case
    recipe: str  # digest of the resolved recipe; a stored result of another recipe is not used
    error: str  # "": the run finished
    before: float  # held-out score, 0 to 1, of greedy answers
    after: float
    reward_first: float  # mean over the first END steps
    reward_last: float
    staleness_mean: float  # versions, over all trained prompts
    staleness_max: int
    steps: int
    samples: int  # of all steps
    seconds: float  # of the steps, without start-up and evaluation
    correction: str = ""  # the recipe's loss.correction


def cases(algorithms: Sequence[str], seeds: int, bounds: Sequence[int]) -> list[Case]:
    """Every run, all of one seed before the next, so that an interrupted benchmark has a full table of fewer seeds.

    `bounds` are the staleness bounds to compare, in versions; the largest is also run without correction.
    """
    found: list[Case] = []
    for seed in range(seeds):
        found += [Case(algorithm, seed) for algorithm in algorithms]
        for algorithm in STALE if bounds else ():
            if algorithm in algorithms:
                found += [Case(algorithm, seed, bound) for bound in bounds]
                found += [Case(algorithm, seed, max(bounds), corrected=False)] if max(bounds) > 0 else []
    return found


RECIPE_HEAD = ("recipe", "seeds", "held-out before", "held-out after", "reward first", "reward last", "seconds")
STALENESS_HEAD = ("recipe", "bound", "correction", "staleness mean, max", "seeds", "held-out after")


def measured(results: Sequence[LearningResult]) -> Measured:
    """The finished runs of each kind of case, averaged, and the runs that did not finish.

    The text is a Markdown table of recipes and one of staleness bounds if any were compared. In the rows the score
    after training has the score before as its peer and 1 as its bound.
    """
    rows, recipes, stale = list[BenchRow](), list[Sequence[object]](), list[Sequence[object]]()
    for kind, runs in grouped((r for r in results if not r.error), lambda r: r.case.kind).items():
        name, seeds = kind.name.removesuffix("-seed0"), len(runs)
        before, after = statistics.fmean(run.before for run in runs), Mean.of(run.after for run in runs)
        first, last = Mean.of(run.reward_first for run in runs), Mean.of(run.reward_last for run in runs)
        staleness = statistics.fmean(run.staleness_mean for run in runs)
        samples, seconds = sum(run.samples for run in runs), sum(run.seconds for run in runs)
        ratio = after.value / before if before else None
        rows += [
            BenchRow(f"{name}: held-out score", after.value, "share", before, ratio, bound=1.0),
            BenchRow(f"{name}: spread over {seeds} seeds", after.spread, "share"),
            BenchRow(f"{name}: reward", last.value, "share", first.value),
            BenchRow(f"{name}: staleness", staleness, "versions", bound=kind.staleness),
            BenchRow(f"{name}: speed", samples / seconds if seconds else 0.0, "samples/s"),
        ]
        if kind.staleness is None:
            recipes.append((kind.algorithm, seeds, f"{before:.3f}", after, first, last, f"{seconds / seeds:.0f}"))
        else:
            age = f"{staleness:.2f}, {max(run.staleness_max for run in runs)}"
            stale.append((kind.algorithm, kind.staleness, runs[0].correction, age, seeds, after))
    stale.sort(key=lambda cells: str(cells[0]))
    failed = [f"did not finish: {result.case.name}: {result.error}" for result in results if result.error]
    parts = [table(RECIPE_HEAD, recipes), table(STALENESS_HEAD, stale), failed]
    return Measured(rows, [line for part in parts if part for line in ("", *part)][1:])
