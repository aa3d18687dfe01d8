"""What a run folder says about its run, whether its process lives, has ended or was killed; nothing is changed."""

from __future__ import annotations

import fcntl
import socket
import sqlite3
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from asyncflow.control.store.run_log import read_end
from asyncflow.observe.journal import read_lines
from asyncflow.observe.report import ledger_totals
from asyncflow.recipe.config import BadInput
from asyncflow.run.run_folder import LOCK, RECIPE
from asyncflow.run.terms import TERM
from protocols.control.runs import RunStatus


def status_of(folder: Path) -> RunStatus:
    """The status of the run in a folder. Raises BadInput if there is none, or a file of it can't be read."""
    if not (folder / RECIPE).exists():
        raise BadInput(f"{folder} is no run folder: it has no {RECIPE}")
    try:
        return _status_of(folder)
    except (OSError, ValueError, msgspec.MsgspecError, sqlite3.Error) as error:  # of TOML, JSON and the ledger
        raise BadInput(f"run {folder}: can't be read: {type(error).__name__}: {error}") from error


def _status_of(folder: Path) -> RunStatus:
    recipe = tomllib.loads((folder / RECIPE).read_text("utf-8"))
    steps = read_lines(folder / "metrics.jsonl")
    holder = holder_of(folder)
    ended = read_end(folder) if holder is None else None
    last = steps[-1] if steps else {}
    checkpoints = sorted((folder / "checkpoints").glob("step_*"))
    totals = ledger_totals(folder / "ledger.db")
    return RunStatus(
        name=folder.name,
        folder=str(folder),
        recipe=str(recipe.get("name", "")),
        algorithm=str(recipe.get("algorithm", "")),
        state="running" if holder is not None else ended.outcome if ended is not None else "killed",
        step=last.get("step", 0),
        steps=int(recipe.get("steps", 0)),
        process=holder.process if holder is not None else 0,
        host=holder.host if holder is not None else "",
        error=ended.error if ended is not None else "",
        reward=last.get("reward_mean"),
        seconds_per_step=_pace(steps[-10:]),
        evaluations={row["metric"]: row["value"] for row in read_lines(folder / "evaluations.jsonl")},
        checkpoint=str(checkpoints[-1]) if checkpoints else "",
        samples={f"{state}: {reason}" if reason else state: count for (state, reason), count in totals.items()},
    )


def runs_in(root: Path) -> list[Path]:
    """The run folders in a folder, the one that was started last first. Raises BadInput where there is none."""
    folders = [recipe.parent for recipe in root.glob(f"*/{RECIPE}")]
    if not folders:
        raise BadInput(f"{root} holds no run: give the folder that run folders are in")
    return sorted(folders, key=_started, reverse=True)


def _started(folder: Path) -> float:
    """Unix time of the run's last start, which takes a term."""
    return max(path.stat().st_mtime for path in (folder / RECIPE, folder / TERM) if path.exists())


class Holder(NamedTuple):
    """The process that runs a run."""

    process: int  # 0: its lock names none
    host: str


def holder_of(folder: Path) -> Holder | None:
    """The process that holds a run's lock; None if none does."""
    lock = folder / LOCK
    if not lock.exists():
        return None
    with lock.open() as file:
        process, _, host = file.read().partition(" ")
        holder = Holder(int(process) if process.isdigit() else 0, host)
        if host == socket.gethostname() and not Path(f"/proc/{holder.process}").exists():
            return None  # it is not tried: for that moment a start would take this for another run
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return holder
    return None


def _pace(steps: list[dict[str, Any]]) -> float | None:
    seconds = [row["seconds"] for row in steps if row.get("seconds")]
    return sum(seconds) / len(seconds) if seconds else None
