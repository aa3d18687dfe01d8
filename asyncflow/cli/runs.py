"""What `asyncflow runs`, `status` and `stop` print and do: they read run folders, and signal a run's process."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncflow.cli.console import err
from asyncflow.recipe.config import BadInput
from asyncflow.run.run_status import runs_in, status_of
from protocols.control.runs import RunStatus


def print_runs(root: Path, as_json: bool, console: Console) -> None:
    """Print the runs in a folder as a table, the last one first, or as JSON."""
    runs: list[RunStatus] = []
    for folder in runs_in(root):
        try:
            runs.append(status_of(folder))
        except BadInput as error:  # the others are listed all the same
            err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    if as_json:
        return _print_json(runs, console)
    table = Table("run", "state", "step", "reward", "held out", "seconds a step", box=box.SIMPLE_HEAD, pad_edge=False)
    for run in runs:
        heldout = ", ".join(f"{metric} {value:.3f}" for metric, value in run.evaluations.items())
        cells = (
            *(Path(run.folder).name, run.state, f"{run.step}/{run.steps}"),
            *(_number(run.reward, ".4f"), heldout, _number(run.seconds_per_step, ".2f")),
        )
        table.add_row(*map(Text, cells))
    return console.print(table)


def print_status(folder: Path, as_json: bool, console: Console) -> None:
    """Print one run's status, a line for each fact, or as JSON."""
    run = status_of(folder)
    if as_json:
        return _print_json(run, console)
    return console.print("\n".join(_facts(run)), markup=False, soft_wrap=True)


def stop(folder: Path) -> str:
    """Ask the process of a running run to drain, as Ctrl-C does. Returns what was done. Raises BadInput."""
    run = status_of(folder)
    if run.state != "running":
        raise BadInput(f"{folder} is not running: it is {run.state} after step {run.step} of {run.steps}")
    if not run.process or run.host != socket.gethostname():
        raise BadInput(f"{folder} runs on {run.host or 'another machine'}, process {run.process}: stop it there")
    try:
        os.kill(run.process, signal.SIGTERM)
    except OSError as error:
        raise BadInput(f"{folder}: its process {run.process} can't be signalled: {error.strerror}") from error
    return f"process {run.process} was asked to finish its step and to write a checkpoint; `status` shows its end"


def _facts(run: RunStatus) -> Iterator[str]:
    where = f", process {run.process} on {run.host}" if run.process else ""
    yield f"{run.recipe}: {run.state}, {run.algorithm}, step {run.step} of {run.steps}{where}"
    if run.error:
        yield f"error: {run.error}"
    if run.reward is not None:
        yield f"reward {run.reward:.4f}, {_number(run.seconds_per_step, '.2f')} s a step"
    yield from (f"held out: {metric} {value:.4f}" for metric, value in run.evaluations.items())
    yield from (f"samples: {count} {state}" for state, count in run.samples.items())
    yield f"checkpoint: {run.checkpoint}" if run.checkpoint else "no checkpoint yet"
    if run.state in ("stopped", "failed", "killed"):
        yield f"to go on: asyncflow resume {run.folder}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _print_json(value: RunStatus | Iterable[RunStatus], console: Console) -> None:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    console.print(text, markup=False, soft_wrap=True)
