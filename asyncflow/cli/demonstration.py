"""What `asyncflow demo` does: prepares data and models, runs PPO, and prints what it has brought."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from asyncflow.cli.console import out
from asyncflow.recipe.config import load_recipe
from protocols.control.events import Evaluated, RunEnded


def demonstrate(recipes: Path, overrides: Iterable[str]) -> RunEnded:
    """Run all three steps of RLHF with the recipes of a folder; how the last one ended."""
    from asyncflow.demo.prepare import prepare

    accuracy = prepare(recipes, out)
    from asyncflow.cli.driving import drive
    from asyncflow.run.launch import launch
    from asyncflow.run.start_progress import StartProgress

    recipe = load_recipe(recipes / "ppo.toml", overrides)
    evaluations: list[Evaluated] = []
    progress = StartProgress()
    ended = drive(launch(recipe, progress=progress), evaluations, progress=progress)
    if ended.outcome == "finished" and len(evaluations) > 1:
        curve = [evaluated for evaluated in evaluations if evaluated.metric == evaluations[0].metric]
        first, last = curve[0], curve[-1]
        if accuracy is not None:
            out.print(f"reward model, held-out pair accuracy: {accuracy:.3f}")
        out.print(
            f"held-out {last.metric} before PPO:    {first.value:.3f}  ({first.samples} prompts no step has seen)"
        )
        out.print(f"held-out {last.metric} after PPO:     {last.value:.3f}")
    return ended
