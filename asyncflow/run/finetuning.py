"""The commands of RLHF's steps 1 and 2: read the settings, check them, and train with a progress bar."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncflow.recipe.config import BadInput, to_settings
from workers.data.datasets import DataError
from workers.finetune.settings import RewardModelSettings, SftSettings

S = TypeVar("S", SftSettings, RewardModelSettings)


def finetune(path: Path, console: Console) -> None:
    """Run `asyncflow sft`. Raises BadInput."""
    settings = read_settings(path, SftSettings)
    _check_model(path, settings)
    _one_thread()
    from workers.finetune.sft import train_sft

    with _progress(console, "sft", settings.schedule.steps) as on_step, _bad_input(path):
        result = train_sft(settings, on_step=on_step)
    console.print(
        f"policy after SFT: {result.output}, loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}", soft_wrap=True
    )


def train_reward(path: Path, console: Console) -> float:
    """Run `asyncflow reward-model`, also for a cost model; returns the held-out pair accuracy. Raises BadInput."""
    settings = read_settings(path, RewardModelSettings)
    _check_model(path, settings)
    _one_thread()
    if settings.kind == "cost":
        return _train_cost(path, settings, console)
    from workers.finetune.reward_model import train_reward_model

    with _progress(console, "reward model", settings.schedule.steps) as on_step, _bad_input(path):
        result = train_reward_model(settings, on_step=on_step)
    console.print(
        f"reward model: {result.output}, held-out pair accuracy {result.heldout_accuracy:.3f}", soft_wrap=True
    )
    return result.heldout_accuracy


def _train_cost(path: Path, settings: RewardModelSettings, console: Console) -> float:
    from workers.finetune.cost_model import train_cost_model

    with _progress(console, "cost model", settings.schedule.steps) as on_step, _bad_input(path):
        result = train_cost_model(settings, on_step=on_step)
    signs = result.heldout_sign_accuracy
    accuracy = "no response is labelled" if signs is None else f"sign accuracy {signs:.3f}"
    console.print(
        f"cost model: {result.output}, held-out pair accuracy {result.heldout_accuracy:.3f}, {accuracy}", soft_wrap=True
    )
    return result.heldout_accuracy


def read_settings(path: Path, kind: type[S]) -> S:
    """Read the settings file of one step. Raises BadInput."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"settings {path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"settings {path}: {error}") from error
    settings = to_settings(table, kind, f"settings {path}")
    if settings.optimizer.decay_steps:
        raise BadInput(f"settings {path}: optimizer.decay_steps is for RL runs; schedule.decay sets the decay here")
    return settings


def _check_model(path: Path, settings: SftSettings | RewardModelSettings) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (Path(settings.model) / name).exists():
            raise BadInput(f"settings {path}: model: {settings.model} is no transformers folder, it has no {name}")
    if not any(Path(settings.model).glob("*.safetensors")):
        raise BadInput(f"settings {path}: model: {settings.model} has no *.safetensors weights")


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
