"""GRPO here and by TRL's GRPOTrainer, side by side: `python -m tests.benchmarks.trl_grpo`.

Both take the same model folder, prompts, reward, samples, mini-batches, optimizer and schedule, on one thread each; the
two take turns, seed by seed, so that what disturbs the machine disturbs both. Both final models are judged by the same
program. TRL lives in a virtual environment that this program makes; it is no dependency of the project.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from rich.console import Console

from asyncflow.bench import learning_start
from asyncflow.bench.learning import RECIPES, Effort, recipe_of, result_of
from asyncflow.bench.learning_table import Case, Mean
from asyncflow.bench.report import Row, report
from asyncflow.config import Recipe

TRL = ("trl==1.16.0", "transformers==5.19.0", "torch==2.13.0")
PEER = Path(__file__).with_name("trl_peer.py")
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def environment(folder: Path) -> Path:
    """The Python of the peer's environment, which is made where it is not there. Minutes, and a network."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *TRL], check=True)
        (folder / "installed").touch()
    return python


def ask(python: Path, what: str, settings: dict[str, Any]) -> dict[str, float]:
    """The answer of the peer's program. It sees neither this environment's packages nor the hub."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [python, PEER, what, json.dumps(settings)],
        env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def settings_of(recipe: Recipe, output: Path) -> dict[str, Any]:
    """What the peer is told: the recipe's numbers."""
    optimizer, loss, policy = recipe.optimizer, recipe.loss, recipe.models["policy"]
    return {
        "model": policy.path,
        "train": recipe.data.train,
        "output": str(output),
        "seed": recipe.seed,
        "steps": recipe.steps,
        "prompts_per_step": recipe.prompts_per_step,
        "samples_per_prompt": recipe.samples_per_prompt,
        "mini_batches": loss.mini_batches,
        "clip": loss.clip_low,
        "kl_coefficient": loss.kl_coefficient,
        "max_tokens": recipe.generation.max_tokens,
        "temperature": recipe.generation.temperature,
        "learning_rate": policy.learning_rate,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "epsilon": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
        "gradient_clip": optimizer.gradient_clip,
        "warmup_steps": optimizer.warmup_steps,
        "decay_steps": optimizer.decay_steps,
    }


def compare(folder: Path, seeds: int, staleness: int) -> list[Row]:
    """Train both, seed by seed, and judge all models. Ours runs ahead by `staleness` versions, TRL's by none."""
    effort = Effort()
    python = environment(folder / "environment")
    learning_start.prepare(folder / "start", effort.start)
    scores: dict[str, list[float]] = {"asyncflow": [], "trl": []}
    speeds: dict[str, list[float]] = {"asyncflow": [], "trl": []}
    for seed in range(seeds):
        case = Case("grpo", seed, staleness)
        recipe = recipe_of(case, RECIPES, folder / "start", effort)
        ours = asyncio.run(result_of(case, folder, recipe))
        trl = ask(python, "train", settings_of(recipe, folder / "trl" / str(seed)))
        models = {"asyncflow": folder / "runs" / case.name / "policy", "trl": folder / "trl" / str(seed)}
        judged = ask(
            python,
            "score",
            {
                "heldout": recipe.data.eval,
                "models": {name: str(model) for name, model in models.items()},
                "max_tokens": recipe.generation.max_tokens,
            },
        )
        speed = {"asyncflow": ours.samples / ours.seconds, "trl": trl["samples"] / trl["seconds"]}
        for name, found in scores.items():
            found.append(judged[name])
            speeds[name].append(speed[name])
            err.print(f"seed {seed}: {name}: {judged[name]:.3f}, {speed[name]:.0f} samples/s")
    return rows(scores, speeds)


def rows(scores: dict[str, list[float]], speeds: dict[str, list[float]]) -> list[Row]:
    """Ours beside TRL's; `peer` is TRL's."""
    score, speed = ({name: Mean.of(of) for name, of in found.items()} for found in (scores, speeds))
    return [
        Row(
            "held-out score",
            score["asyncflow"].value,
            "share",
            score["trl"].value,
            score["asyncflow"].value / max(score["trl"].value, 1e-9),
            bound=1.0,
        ),
        Row("held-out score: spread over seeds", score["asyncflow"].spread, "share", score["trl"].spread),
        Row(
            "speed",
            speed["asyncflow"].value,
            "samples/s",
            speed["trl"].value,
            speed["asyncflow"].value / speed["trl"].value,
        ),
    ]


def main() -> int:
    """Exit code 0: done, 1: the environment could not be made or the peer failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/trl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=0, help="of ours, in versions; TRL is synchronous")
    given = parser.parse_args()
    try:
        told = compare(given.folder.absolute(), given.seeds, given.staleness)
    except subprocess.CalledProcessError as error:
        err.print(f"error: {error.cmd[0]} {' '.join(map(str, error.cmd[1:4]))}: exit code {error.returncode}")
        return 1
    out.print(report("trl_grpo", told), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
