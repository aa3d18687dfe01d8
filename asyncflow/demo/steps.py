"""Steps 1 and 2 of RLHF as commands run them, and the preparation of the demonstration."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncflow.config import BadInput, nearest
from workers.datasets import DataError
from workers.finetune_settings import RewardModelSettings, SftSettings

S = TypeVar("S", SftSettings, RewardModelSettings)
RESULT = "training.json"  # beside the weights: what training came to


def finetune(path: Path, console: Console) -> None:
    """`asyncflow sft`. Raises BadInput."""
    settings = _read(path, SftSettings)
    _check_model(path, settings)
    _one_thread()
    from workers.sft import train_sft

    with _progress(console, "sft", settings.schedule.steps) as on_step, _bad_input(path):
        result = train_sft(settings, on_step=on_step)
    console.print(
        f"policy after SFT: {result.output}, loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}", soft_wrap=True
    )


def train_reward(path: Path, console: Console) -> float:
    """`asyncflow reward-model`; the held-out pair accuracy. Raises BadInput."""
    settings = _read(path, RewardModelSettings)
    _check_model(path, settings)
    _one_thread()
    from workers.preference import train_reward_model

    with _progress(console, "reward model", settings.schedule.steps) as on_step, _bad_input(path):
        result = train_reward_model(settings, on_step=on_step)
    (Path(result.output) / RESULT).write_text(json.dumps({"heldout_pair_accuracy": result.heldout_accuracy}))
    console.print(
        f"reward model: {result.output}, held-out pair accuracy {result.heldout_accuracy:.3f}", soft_wrap=True
    )
    return result.heldout_accuracy


def prepare(recipes: Path, console: Console) -> float | None:
    """What the recipes of a demonstration start from, unless it is there: data, base model, SFT, reward model.

    The folder's name is the task's. Returns the reward model's held-out pair accuracy, None where a rule rewards.
    Raises BadInput.
    """
    from asyncflow.demo.comparisons import write_comparisons
    from asyncflow.demo.model import write_base_model
    from asyncflow.demo.task import TASKS

    if recipes.name not in TASKS:
        raise BadInput(f"demo {recipes}: no task {recipes.name!r}{nearest(recipes.name, TASKS)}")
    sft = _read(recipes / "sft.toml", SftSettings)
    data = Path(sft.data).parent
    if not (data / "train.jsonl").exists():
        TASKS[recipes.name](data, sft.schedule.seed)
    if not (Path(sft.model) / "tokenizer.json").exists():  # what is written last: the folder may be half of one
        write_base_model(Path(sft.model), sft.schedule.seed)
    if not Path(sft.output).exists():
        finetune(recipes / "sft.toml", console)
    if not (recipes / "reward.toml").exists():
        return None
    reward = _read(recipes / "reward.toml", RewardModelSettings)
    if not Path(reward.heldout).exists():
        with console.status("labellers compare answers of the policy"):
            for name in ("comparisons", "heldout_comparisons"):
                write_comparisons(Path(sft.output), data, name, reward.schedule.seed)
    result = Path(reward.output) / RESULT
    if not result.exists():
        return train_reward(recipes / "reward.toml", console)
    return float(json.loads(result.read_text())["heldout_pair_accuracy"])


def _read(path: Path, kind: type[S]) -> S:
    try:
        settings = msgspec.convert(tomllib.loads(path.read_text()), kind)
    except OSError as error:
        raise BadInput(f"settings {path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"settings {path}: {error}") from error
    return settings


def _check_model(path: Path, settings: SftSettings | RewardModelSettings) -> None:
    if not (Path(settings.model) / "config.json").exists():
        raise BadInput(f"settings {path}: model: no transformers folder {settings.model}")


def _one_thread() -> None:
    """Small models gain nothing from a second thread, and one thread gives the same bits every time."""
    import torch

    torch.set_num_threads(1)


@contextmanager
def _bad_input(path: Path) -> Iterator[None]:
    try:
        yield
    except (DataError, FileExistsError) as error:
        raise BadInput(f"settings {path}: {error}") from error


@contextmanager
def _progress(console: Console, what: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(what, total=steps, loss=float("nan"))
        yield lambda step, loss: progress.update(task, completed=step + 1, loss=loss)
