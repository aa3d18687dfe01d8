"""Prepares a demonstration: its data and the models of RLHF's steps 1 and 2. Existing files are reused."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from asyncflow.recipe.config import BadInput, nearest
from asyncflow.run.finetuning import finetune, read_settings, train_reward
from workers.finetune.settings import RewardModelSettings, SftSettings


def prepare(recipes: Path, console: Console) -> float | None:
    """Make what a folder of recipes starts from, unless it exists: data, base model, SFT model, cost or reward model.

    The folder's name is the name of the task. Returns the reward model's held-out pair accuracy, None if a rule gives
    the rewards. Raises BadInput.
    """
    from asyncflow.demo.comparisons import write_comparisons
    from asyncflow.demo.model import model_config, write_base_model
    from asyncflow.demo.retelling import write_retelling
    from asyncflow.demo.task import TASKS
    from workers.finetune.reward_model import heldout_accuracy_of

    tasks = {**TASKS, "safety": write_retelling}
    if recipes.name not in tasks:
        raise BadInput(f"demo {recipes}: no task {recipes.name!r}{nearest(recipes.name, tasks)}")
    sft = read_settings(recipes / "sft.toml", SftSettings)
    data = Path(sft.data).parent
    if not (data / "train.jsonl").exists():
        tasks[recipes.name](data, sft.schedule.seed)
    if not (Path(sft.model) / "tokenizer.json").exists():  # written last, so the folder is complete
        small = None if recipes.name == "sorting" else model_config(layers=2, width=64)  # the other tasks are easier
        write_base_model(Path(sft.model), sft.schedule.seed, small)
    if not Path(sft.output).exists():
        finetune(recipes / "sft.toml", console)
    if (recipes / "cost.toml").exists():
        cost = read_settings(recipes / "cost.toml", RewardModelSettings)
        if not Path(cost.output).exists():
            train_reward(recipes / "cost.toml", console)
    if not (recipes / "reward.toml").exists():
        return None
    reward = read_settings(recipes / "reward.toml", RewardModelSettings)
    if not Path(reward.heldout).exists():
        with console.status("labellers compare answers of the policy"):
            for name in ("comparisons", "heldout_comparisons"):
                write_comparisons(Path(sft.output), data, name, reward.schedule.seed)
    if not Path(reward.output).exists():
        return train_reward(recipes / "reward.toml", console)
    return heldout_accuracy_of(reward.output)
