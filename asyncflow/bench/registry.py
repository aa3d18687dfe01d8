"""The benchmarks of `asyncflow bench NAME`, with their options.

Each is the module of that name in this package. Its function `run` takes `quick` and the options listed here, as
keywords, and returns a `Measured`. The modules load Ray or torch, so a benchmark is imported only when it runs.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from asyncflow.bench.report import Measured


class Option(NamedTuple):
    """A command-line option; its type is its default's."""

    name: str
    default: Any
    help: str
    least: int | None = None  # of an integer


class Benchmark(NamedTuple):
    """A benchmark's name, the text of its --help, and its own options."""

    name: str
    summary: str
    options: tuple[Option, ...] = ()

    def run(self, **options: Any) -> Measured:
        """Import the benchmark and run it. Raises BadInput for options that can't be used."""
        return import_module(f"asyncflow.bench.{self.name}").run(**options)


BENCHMARKS = (
    Benchmark("channels", "The cost of a hop, compared with a padded batch, bare Ray and a memory copy. Minutes."),
    Benchmark(
        "transition",
        "From training to generation: full gather, vanilla grouping and HybridFlow's grouping. About a minute.",
        (
            Option("train", "1-4-2", "The training layout, p-t-d."),
            Option("generate", "1-2", "The generation layout, p_g-t_g."),
        ),
    ),
    Benchmark(
        "training",
        "Memory of a training step, the head in chunks against all logits; tokens/s, rows sorted against in order.",
        (
            Option("model", Path(), "A language model's folder; by default a small one with a vocabulary of 151,936."),
            Option("rows", 2, "Rows of the step whose memory is measured.", least=1),
            Option("tokens", 512, "Tokens of each of them.", least=2),
            Option("budget", 2048, "Padded tokens of a micro-batch where speed is measured.", least=1),
        ),
    ),
    Benchmark("planning", "Seconds of the placement search and of the simulator at growing sizes. About a minute."),
    Benchmark(
        "learning",
        "Whether every recipe learns, and what staleness costs. About a minute a run; continues if interrupted.",
        (
            Option("algorithms", "", "Recipes to run, e.g. ppo,grpo; by default all."),
            Option("seeds", 3, "Runs of each case.", least=1),
            Option("staleness", "0,2,4", 'Bounds to compare, in versions; "" compares none.'),
            Option("folder", Path("runs/bench/learning"), "Data, runs and results; existing results are reused."),
        ),
    ),
    Benchmark(
        "safety",
        "The cost of the answers of PPO and of Safe-RLHF where the highest reward is unsafe. Half a minute a run.",
        (
            Option("seeds", 3, "Runs of each algorithm.", least=1),
            Option("folder", Path("runs/bench/safety"), "Where the runs are written."),
        ),
    ),
)
