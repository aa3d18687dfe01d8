"""GRPO by this project and by TRL's GRPOTrainer, side by side: `python -m tests.benchmarks.trl_grpo`.

Both use the same model folder, prompts, reward, samples, mini-batches, optimizer and schedule, on one thread each. They
take turns, seed by seed, so that a disturbance hits both. The same program scores both final models. With `--losses`
it compares the value and the gradient of both losses for the same tokens instead. TRL is installed in a virtual
environment that this program creates; it is not a dependency of the project.
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

import msgspec
import numpy as np
import torch
from rich.console import Console

from asyncflow.bench.learning import RECIPES, result_of
from asyncflow.bench.learning_table import Case
from asyncflow.bench.recipe_runs import recipe_of
from asyncflow.bench.report import BenchRow, Mean, format_report
from asyncflow.demo.prepare import prepare
from asyncflow.observe.journal import read_lines
from asyncflow.recipe.config import Recipe, load_recipe
from protocols.data.jagged import Jagged
from workers.losses import POLICY_LOSSES
from workers.losses.aggregation import counts_of, reduce_loss, token_weights
from workers.losses.objective import policy_objective
from workers.losses.tokens import Tokens
from workers.settings import Loss

TRL = ("trl==1.16.0", "transformers==5.19.0", "torch==2.13.0")
PEER = Path(__file__).with_name("trl_peer.py")
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def environment(folder: Path) -> Path:
    """The Python of the peer's environment. Creating it takes minutes and needs a network."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *TRL], check=True)
        (folder / "installed").touch()
    return python


def run_peer(python: Path, what: str, settings: dict[str, Any]) -> dict[str, float]:
    """Run the peer's program and return its answer. It sees neither this environment's packages nor the hub."""
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
    """The recipe's settings as the peer reads them."""
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


class Measured(msgspec.Struct):
    """The results of one side, one number per seed."""

    scores: list[float] = []  # on held-out problems
    speeds: list[float] = []  # samples/s
    generation: list[float] = []  # seconds a step
    other: list[float] = []  # seconds a step of everything else


def compare(python: Path, folder: Path, seeds: int, staleness: int, steps: int) -> dict[str, Measured]:
    """Train both, seed by seed, and score all models. Ours runs ahead by `staleness` versions, TRL's by none."""
    prepare(RECIPES, err)
    found = {"asyncflow": Measured(), "trl": Measured()}
    for seed in range(seeds):
        case = Case("grpo", seed, staleness)
        fewer = [f"steps={steps}"] if steps else []
        recipe = recipe_of(RECIPES / f"{case.algorithm}.toml", [*fewer, *case.overrides])
        ours = asyncio.run(result_of(case, folder, recipe))
        if ours.error:
            raise RuntimeError(f"{case.name}: {ours.error}")
        trl = run_peer(python, "train", settings_of(recipe, folder / "trl" / str(seed)))
        models = {"asyncflow": folder / "runs" / case.name / "policy", "trl": folder / "trl" / str(seed)}
        scores = run_peer(
            python,
            "score",
            {
                "heldout": recipe.data.eval,
                "models": {name: str(model) for name, model in models.items()},
                "max_tokens": recipe.generation.max_tokens,
            },
        )
        journal = read_lines(folder / "runs" / case.name / "metrics.jsonl")
        ours_generation = sum(step["busy.generator_seconds"] for step in journal)
        generation = {"asyncflow": ours_generation, "trl": trl["generation_seconds"]}
        seconds = {"asyncflow": ours.seconds, "trl": trl["seconds"]}
        for name, measured in found.items():
            measured.scores.append(scores[name])
            measured.speeds.append(ours.samples / seconds[name])
            measured.generation.append(generation[name] / recipe.steps)
            measured.other.append((seconds[name] - generation[name]) / recipe.steps)
            err.print(
                f"seed {seed}: {name}: {scores[name]:.3f}, {measured.speeds[-1]:.0f} samples/s, a step is "
                f"{measured.generation[-1]:.3f} s of generation and {measured.other[-1]:.3f} s of everything else"
            )
    return found


def rows(found: dict[str, Measured]) -> list[BenchRow]:
    """Our figures, with TRL's as the peer."""
    ours, trl = found["asyncflow"], found["trl"]
    score, peer = Mean.of(ours.scores), Mean.of(trl.scores)
    speed, its = Mean.of(ours.speeds).value, Mean.of(trl.speeds).value
    return [
        BenchRow("held-out score", score.value, "share", peer.value, score.value / max(peer.value, 1e-9), bound=1.0),
        BenchRow("held-out score: spread over seeds", score.spread, "share", peer.spread),
        BenchRow("speed", speed, "samples/s", its, speed / its),
        BenchRow("generation", Mean.of(ours.generation).value, "s a step", Mean.of(trl.generation).value),
        BenchRow("everything else", Mean.of(ours.other).value, "s a step", Mean.of(trl.other).value),
    ]


# --- the losses


LOSSES: dict[str, tuple[Loss, dict[str, Any]]] = {  # ours, and TRL's arguments for the same loss
    "grpo": (
        Loss(dual_clip=0.0, kl_coefficient=0.04, aggregation="sequence-mean-token-mean"),
        {"loss_type": "grpo", "beta": 0.04},
    ),
    "dr_grpo": (
        Loss(dual_clip=0.0, aggregation="sequence-mean-fixed-length", fixed_length=9),
        {"loss_type": "dr_grpo", "max_completion_length": 9},
    ),
    "dapo": (Loss(dual_clip=0.0, clip_high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "ppo, dual clip": (Loss(dual_clip=1.5), {"loss_type": "bnpo", "delta": 1.5}),
    "gspo": (
        Loss(policy="gspo", clip_low=3e-2, clip_high=4e-2, dual_clip=0.0, aggregation="sequence-mean-token-mean"),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    ),
    "cispo": (Loss(policy="cispo", clip_low=1.0, clip_high=0.5), {"loss_type": "cispo", "epsilon_high": 1.5}),
}
LENGTHS = (3, 1, 9, 5, 7, 2)
MOST_DIFFERENCE = 1e-6


def compare_losses(python: Path, folder: Path) -> list[BenchRow]:
    """The largest difference in value or in a log-prob's gradient, over six rows of float64 tokens."""
    prepare(RECIPES, err)
    rng = np.random.default_rng(0)
    own = [rng.normal(-1.0, 0.5, length) for length in LENGTHS]
    columns = {
        "log_probs": own,
        "old": [row + rng.normal(0, 0.3, len(row)) for row in own],
        "reference": [row + rng.normal(0, 0.3, len(row)) for row in own],
    }
    advantages = rng.normal(size=len(LENGTHS))
    theirs: Any = run_peer(
        python,
        "losses",
        {name: [row.tolist() for row in rows] for name, rows in columns.items()}
        | {
            "advantages": advantages.tolist(),
            "model": load_recipe(RECIPES / "grpo.toml").models["policy"].path,
            "output": str(folder / "losses"),
            "losses": {name: arguments for name, (_, arguments) in LOSSES.items()},
        },
    )
    found = []
    for name, (loss, _) in LOSSES.items():
        value, gradient = loss_of(loss, columns, advantages)
        differences = [value - theirs[name]["value"], *(gradient - theirs[name]["gradient"])]
        found.append(BenchRow(f"{name}: largest difference", max(map(abs, differences)), "nats", bound=MOST_DIFFERENCE))
    return found


def loss_of(loss: Loss, columns: dict[str, list[Any]], advantages: Any) -> tuple[float, Any]:
    """The value of our loss, and its gradient with respect to each token's log-prob."""
    flat = {name: torch.from_numpy(np.concatenate(rows)) for name, rows in columns.items()}
    log_probs = flat["log_probs"].requires_grad_()
    mask = Jagged.from_rows([[1] * length for length in LENGTHS], np.uint8)
    tokens = Tokens(
        log_probs=log_probs,
        old_log_probs=flat["old"],
        rollout_log_probs=flat["old"],
        advantages=torch.from_numpy(np.repeat(advantages, LENGTHS)),
        mask=torch.ones(sum(LENGTHS), dtype=torch.bool),
        lengths=torch.tensor(LENGTHS),
        reference=flat["reference"],
    )
    weights = torch.from_numpy(token_weights(mask, counts_of(mask), loss).values.copy())
    value = reduce_loss(policy_objective(POLICY_LOSSES[loss.policy], tokens, loss).loss, weights)
    value.backward()
    assert log_probs.grad is not None
    return value.item(), log_probs.grad.numpy()


def main() -> int:
    """Exit code 0: done, 1: the environment could not be created, the peer failed, or losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/trl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=0, help="of ours, in versions; TRL is synchronous")
    parser.add_argument("--steps", type=int, default=0, help="0: the recipe's; fewer to measure only the speed")
    parser.add_argument("--losses", action="store_true", help="compare the losses and their gradients instead")
    given = parser.parse_args()
    folder = given.folder.absolute()
    try:
        python = environment(folder / "environment")
        if given.losses:
            found_rows = compare_losses(python, folder)
        else:
            runs = folder / f"{given.steps}_steps" if given.steps else folder
            found_rows = rows(compare(python, runs, given.seeds, given.staleness, given.steps))
    except subprocess.CalledProcessError as error:
        err.print(f"error: {error.cmd[0]} {' '.join(map(str, error.cmd[1:4]))}: exit code {error.returncode}")
        return 1
    out.print(format_report("trl_grpo", found_rows), markup=False)
    return int(given.losses and any(row.value > MOST_DIFFERENCE for row in found_rows))


if __name__ == "__main__":
    sys.exit(main())
