"""The cases of the learning benchmark, and the tables of their results. Pure: from results to text.

The tables answer two questions. Does every recipe raise its held-out score, whatever the seed? And what does staleness
cost, with the recipe's off-policy correction at each bound, and without it at the largest bound?
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec

from asyncflow.bench.report import BenchRow

END = 5  # steps over which the first and the last reward are averaged
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


class Mean(msgspec.Struct, frozen=True):
    """A figure over seeds: the mean and the sample standard deviation (0 for one seed)."""

    value: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.spread:.3f}"


class Summary(msgspec.Struct, frozen=True):
    """The finished runs of one kind of case."""

    kind: Case
    correction: str
    seeds: int
    before: Mean
    after: Mean
    reward_first: Mean
    reward_last: Mean
    staleness_mean: float
    staleness_max: int
    seconds: float  # mean
    samples_per_second: float


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


def summaries(results: Iterable[LearningResult]) -> list[Summary]:
    """One summary for each kind with a finished run, in order of first appearance."""
    by_kind: dict[Case, list[LearningResult]] = {}
    for result in results:
        if not result.error:
            by_kind.setdefault(result.case.kind, []).append(result)
    return [_summary(kind, done) for kind, done in by_kind.items()]


def _summary(kind: Case, done: Sequence[LearningResult]) -> Summary:
    seconds = sum(result.seconds for result in done)
    return Summary(
        kind=kind,
        correction=done[0].correction,
        seeds=len(done),
        before=Mean.of([result.before for result in done]),
        after=Mean.of([result.after for result in done]),
        reward_first=Mean.of([result.reward_first for result in done]),
        reward_last=Mean.of([result.reward_last for result in done]),
        staleness_mean=statistics.fmean(result.staleness_mean for result in done),
        staleness_max=max(result.staleness_max for result in done),
        seconds=seconds / len(done),
        samples_per_second=sum(result.samples for result in done) / seconds if seconds else 0.0,
    )


# --- as text


def lines(results: Sequence[LearningResult]) -> list[str]:
    """A Markdown table of recipes, one of staleness bounds if any were compared, and the runs that did not finish."""
    found = summaries(results)
    recipes = [one for one in found if one.kind.staleness is None]
    stale = sorted((one for one in found if one.kind.staleness is not None), key=lambda one: one.kind.algorithm)
    failed = [f"did not finish: {result.case.name}: {result.error}" for result in results if result.error]
    parts = [table(RECIPE_HEAD, map(_recipe_cells, recipes)), table(STALENESS_HEAD, map(_stale_cells, stale)), failed]
    return [line for part in parts if part for line in ("", *part)][1:]


RECIPE_HEAD = ("recipe", "seeds", "held-out before", "held-out after", "reward first", "reward last", "seconds")
STALENESS_HEAD = ("recipe", "bound", "correction", "staleness mean, max", "seeds", "held-out after")


def _recipe_cells(one: Summary) -> tuple[str, ...]:
    scores = (f"{one.before.value:.3f}", str(one.after), str(one.reward_first), str(one.reward_last))
    return (one.kind.algorithm, str(one.seeds), *scores, f"{one.seconds:.0f}")


def _stale_cells(one: Summary) -> tuple[str, ...]:
    age = f"{one.staleness_mean:.2f}, {one.staleness_max}"
    return (one.kind.algorithm, str(one.kind.staleness), one.correction, age, str(one.seeds), str(one.after))


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; no lines if it has no rows."""
    found = list(body)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *found)] if found else []


def rows(results: Iterable[LearningResult]) -> list[BenchRow]:
    """The results as rows: the score after training, with the score before as its peer and 1 as its bound."""
    found = []
    for one in summaries(results):
        name = one.kind.name.removesuffix("-seed0")
        ratio = one.after.value / one.before.value if one.before.value else None
        found += [
            BenchRow(f"{name}: held-out score", one.after.value, "share", one.before.value, ratio, bound=1.0),
            BenchRow(f"{name}: spread over {one.seeds} seeds", one.after.spread, "share"),
            BenchRow(f"{name}: reward", one.reward_last.value, "share", one.reward_first.value),
            BenchRow(f"{name}: staleness", one.staleness_mean, "versions", bound=one.kind.staleness),
            BenchRow(f"{name}: speed", one.samples_per_second, "samples/s"),
        ]
    return found
