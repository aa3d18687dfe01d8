"""The commands of RLHF's steps 1 and 2: read the settings, check them, and train with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncflow.observe.training_report import write_training_report
from asyncflow.recipe.config import BadInput, read_table, to_settings
from asyncflow.recipe.model_folders import unusable_folder
from workers.data.datasets import DataError, MissingField
from workers.data.tokenizer import BadTokenizer
from workers.finetune.settings import FineTuning, RewardModelSettings, SftSettings

S = TypeVar("S", bound=FineTuning)


def finetune(path: Path, console: Console, overrides: Iterable[str] = ()) -> None:
    """Run `asyncflow sft`. Raises BadInput."""
    settings = read_settings(path, SftSettings, overrides)
    with _training(path, settings, console, "sft") as (on_step, on_warning):
        from workers.finetune.sft import train_sft

        result = train_sft(settings, on_step=on_step, on_warning=on_warning)
    heldout = "" if result.heldout_loss is None else f", held-out loss {result.heldout_loss:.3f}"
    losses = f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}{heldout}"
    console.print(f"policy after SFT: {result.output}, {losses}", soft_wrap=True, markup=False)


def train_reward(path: Path, console: Console, overrides: Iterable[str] = ()) -> float | None:
    """Run `asyncflow reward-model`, also for a cost model. Raises BadInput.

    Returns the held-out pair accuracy, None without held-out pairs.
    """
    settings = read_settings(path, RewardModelSettings, overrides)
    what, signs = f"{settings.kind} model", ""
    with _training(path, settings, console, what) as (on_step, on_warning):
        from workers.finetune.cost_model import train_cost_model
        from workers.finetune.reward_model import train_reward_model

        if settings.kind == "reward":
            result = train_reward_model(settings, on_step=on_step, on_warning=on_warning)
        else:
            result = train_cost_model(settings, on_step=on_step, on_warning=on_warning)
            accuracy = result.heldout_sign_accuracy
            signs = ", no response is labelled" if accuracy is None else f", sign accuracy {accuracy:.3f}"
    found = f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}"
    if result.heldout_accuracy is not None:
        found = f"held-out pair accuracy {result.heldout_accuracy:.3f}{signs}"
    console.print(f"{what}: {result.output}, {found}", soft_wrap=True, markup=False)
    return result.heldout_accuracy


def read_settings(path: Path, kind: type[S], overrides: Iterable[str] = ()) -> S:
    """Read the settings file of one step and apply `a.b=c` overrides. Raises BadInput."""
    settings = to_settings(read_table(path, "settings", overrides), kind, f"settings {path}")
    if settings.optimizer.decay_steps:
        raise BadInput(f"settings {path}: optimizer.decay_steps is for RL runs; schedule.decay sets the decay here")
    if settings.lora.publish != "merged":
        raise BadInput(f"settings {path}: lora.publish is for RL runs; the output has adapters and merged weights both")
    if settings.lora.rank and find_spec("peft") is None:
        raise BadInput(f"settings {path}: lora needs peft: pip install 'asyncflow[lora]'")
    if settings.evaluate_every and not settings.heldout:
        raise BadInput(f"settings {path}: evaluate_every = {settings.evaluate_every}: there is no heldout to evaluate")
    return settings


def _check_model(path: Path, settings: FineTuning) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (Path(settings.model) / name).exists():
            raise BadInput(f"settings {path}: model: {settings.model} is no transformers folder, it has no {name}")
    head = "tokens" if isinstance(settings, SftSettings) else "value"  # a new score head, as a critic's may be
    if reason := unusable_folder(settings.model, head):
        raise BadInput(f"settings {path}: model: {reason}")


@contextmanager
def _training(
    path: Path, settings: FineTuning, console: Console, what: str
) -> Iterator[tuple[Callable[[int, float], None], Callable[[str], None]]]:
    """Context of a training with a progress bar: a function that moves it, and one that warns. Raises BadInput."""
    _check_model(path, settings)
    import torch

    from workers.finetune.dropout import NoDropout
    from workers.training.optimizer_step import StepRefused

    torch.set_num_threads(1)  # small models gain nothing from a second one, and one gives the same bits every time
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(what, total=settings.schedule.steps, loss=float("nan"))
        try:
            yield (
                lambda step, loss: progress.update(task, completed=step + 1, loss=loss),
                lambda text: console.print(f"warning: {text}", markup=False, soft_wrap=True),
            )
            write_training_report(Path(settings.output), what)
        except MissingField as error:
            raise BadInput(
                f'settings {path}: {error}: [columns] says which (field = "name", a.b: b inside of a)'
            ) from error
        except (BadTokenizer, DataError, FileExistsError, NoDropout) as error:
            raise BadInput(f"settings {path}: {error}") from error
        except StepRefused as error:
            raise BadInput(f"settings {path}: {error}: schedule.learning_rate may be too high") from error
