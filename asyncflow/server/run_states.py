"""What state a run is in, from its folder, the server's record of it and its process."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncflow.control.store.run_log import ENDED
from asyncflow.run.run_folder import RECIPE
from asyncflow.run.run_status import status_of
from asyncflow.server.endpoint_file import read_endpoint
from asyncflow.server.processes import lives
from asyncflow.server.records import RunRecord
from protocols.control.events import RunEnded
from protocols.control.problems import NotFound
from protocols.control.runs import OVER, RunState, RunStatus

INTERRUPTED = (0, 130)  # the exit codes of a process that was asked to end, before it had begun
BAD_INPUT = 2  # the exit code of a process that can't run its recipe


def state_of(folder: Path, record: RunRecord | None, exit_code: int | None) -> RunStatus:
    """How a run stands. Blocking.

    Args:
        record: None for a run that was started by hand.
        exit_code: of its last process, where this server started it and saw it end.

    Raises NotFound where there is no such run, BadInput where its folder can't be read.
    """
    holds = (folder / RECIPE).is_file()
    if not holds and record is None:
        raise NotFound(f"there is no run {folder.name!r}")
    found = status_of(folder) if holds else _without_folder(folder, record)
    if record is None:
        return found
    state, error = found.state, found.error
    if record.wanted == "start":
        state, error = "queued", ""
    elif not record.process and not holds:
        state, error = "stopped", "it was cancelled while it waited for devices"
    elif found.state == "running":
        has_endpoint = found.process != record.process or read_endpoint(folder, found.process) is not None
        state = "running" if has_endpoint else "starting"
    elif not (holds and _ended_since(folder, record.created)):
        state = _before_it_began(folder, record, exit_code, found.state)
    return msgspec.structs.replace(found, state=state, error=error)


def _before_it_began(folder: Path, record: RunRecord, exit_code: int | None, state: RunState) -> RunState:
    """The state of a run whose last process has not written how it ended, since it was started."""
    if lives(record.process, record.process_start):
        return "checking"
    if exit_code in INTERRUPTED:
        return "stopped"
    began = state == "killed" and exit_code != BAD_INPUT and not (folder / ENDED).exists()
    return "killed" if began else "refused"


def _ended_since(folder: Path, started: float) -> bool:
    try:
        return (folder / ENDED).stat().st_mtime >= started
    except FileNotFoundError:
        return False


def _without_folder(folder: Path, record: RunRecord | None) -> RunStatus:
    recipe = msgspec.toml.decode(record.recipe) if record is not None and record.recipe else {}
    return RunStatus(
        name=folder.name,
        folder=str(folder),
        recipe=str(recipe.get("name", "")),
        algorithm=str(recipe.get("algorithm", "")),
        state="refused",
        step=0,
        steps=int(recipe.get("steps", 0)),
    )


def end_of(found: RunStatus) -> RunEnded | None:
    """How a run ended, for those who follow its events; None while it goes on."""
    if found.state not in OVER:
        return None
    if found.state == "finished" or found.state == "stopped":  # noqa: PLR1714 - it narrows the type
        code = 0 if found.state == "finished" else 130
        return RunEnded(outcome=found.state, step=found.step, error=found.error, exit_code=code)
    code = 137 if found.state == "killed" else BAD_INPUT if found.state == "refused" else 1
    text = found.error or "its process was killed: start it again, it goes on from its last checkpoint"
    return RunEnded(outcome="failed", step=found.step, error=text, exit_code=code)
