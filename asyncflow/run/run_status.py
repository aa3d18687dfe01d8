"""What a run folder says about its run, whether its process lives, has ended or was killed; nothing is changed."""

from __future__ import annotations

import fcntl
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from asyncflow.control.store.run_log import read_end
from asyncflow.observe.journal import read_lines
from asyncflow.observe.report import ledger_totals
from asyncflow.recipe.config import BadInput
from asyncflow.run.run_folder import LOCK, RECIPE

State = Literal["running", "finished", "stopped", "failed", "killed"]


class RunStatus(msgspec.Struct, frozen=True):
    """One run as its folder shows it."""

    folder: str
    name: str
    algorithm: str
    state: State  # killed: its process ended without saying how
    step: int  # committed steps
    steps: int  # that the recipe asks for
    process: int = 0  # of the controller on its machine, while the run is running
    error: str = ""
    reward: float | None = None  # mean of the last step's samples
    seconds_per_step: float | None = None  # mean of the last ten
    evaluations: dict[str, float] = {}  # metric -> its last value
    checkpoint: str = ""  # the newest one's folder; it is not verified here
    samples: dict[str, int] = {}  # "state" or "state: reason" -> count in the ledger


def status_of(folder: Path) -> RunStatus:
    """The status of the run in a folder. Raises BadInput if there is none, or its recipe can't be read."""
    try:
        recipe = tomllib.loads((folder / RECIPE).read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{folder} is no run folder: it has no {RECIPE}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / RECIPE}: {error}") from error
    steps = read_lines(folder / "metrics.jsonl")
    state, process, error = _state(folder)
    last = steps[-1] if steps else {}
    checkpoints = sorted((folder / "checkpoints").glob("step_*"))
    totals = ledger_totals(folder / "ledger.db")
    return RunStatus(
        folder=str(folder),
        name=str(recipe.get("name", folder.name)),
        algorithm=str(recipe.get("algorithm", "")),
        state=state,
        step=last.get("step", 0),
        steps=int(recipe.get("steps", 0)),
        process=process,
        error=error,
        reward=last.get("reward_mean"),
        seconds_per_step=_pace(steps[-10:]),
        evaluations={row["metric"]: row["value"] for row in read_lines(folder / "evaluations.jsonl")},
        checkpoint=str(checkpoints[-1]) if checkpoints else "",
        samples={f"{state}: {reason}" if reason else state: count for (state, reason), count in totals.items()},
    )


def runs_in(root: Path) -> Iterator[RunStatus]:
    """The runs in the folders of `root`, the one that was started last first. Raises BadInput where there is none."""
    recipes = sorted(root.glob(f"*/{RECIPE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not recipes:
        raise BadInput(f"{root} holds no run: give the folder that run folders are in")
    return (status_of(recipe.parent) for recipe in recipes)


def _state(folder: Path) -> tuple[State, int, str]:
    """The state, the process of a running run, and the error of a failed one."""
    if process := _holder(folder / LOCK):
        return "running", process, ""
    ended = read_end(folder)
    return (ended.outcome, 0, ended.error) if ended is not None else ("killed", 0, "")


def _holder(lock: Path) -> int:
    """The process that holds the run's lock; 0 if none does, -1 if it is not known."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                text = file.read().strip()
                return int(text) if text.isdigit() else -1
    except FileNotFoundError:
        pass
    return 0


def _pace(steps: list[dict[str, Any]]) -> float | None:
    seconds = [row["seconds"] for row in steps if row.get("seconds")]
    return sum(seconds) / len(seconds) if seconds else None
