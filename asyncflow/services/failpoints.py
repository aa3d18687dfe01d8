"""Failpoints: named places at which a test makes a process die or stop. Otherwise they do nothing.

ASYNCFLOW_FAILPOINTS names a folder. A test arms a place with a file of its name in it, which says what happens there:
"kill" or "stop", as SIGKILL and SIGSTOP do. The process that reaches the place first removes the file, and obeys. So it
happens once, also where many processes, or the successor of the first, reach the same place.

A place is PROCESS.MOMENT. Processes are the services ("policy"), their ranks where there are several ("policy-1"), and
the controller.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "ASYNCFLOW_FAILPOINTS"
_FOLDER = os.environ.get(VARIABLE, "")

MOMENTS = {
    "generating": "rows left the engine, and nobody knows of them yet",
    "generated": "finished rollouts are about to be sent",
    "taken": "a stage has taken rows, and nothing is computed",
    "computed": "a stage's rows are computed, and not sent",
    "closing": "the experience of a batch is computed, and not sent to the trainers",
    "training": "a batch is about to be trained",
    "trained": "the optimizer step is done, and the controller does not know",
    "publish": "a snapshot of the weights is about to be taken",
    "load": "published weights are about to be installed",
    "checkpoint": "a service is about to write its state; of the controller: all have, and no manifest is written",
    "restore": "a service is about to load its state",
    "admitted": "prompts are in the ledger, and not sent",
    "committing": "all models are trained and published, and the step is not committed",
    "draining": "a stopped run is about to write its last checkpoint",
}


def reach(process: str, moment: str) -> None:
    """A process is at a moment of `MOMENTS`."""
    if _FOLDER:
        _obey(Path(_FOLDER) / f"{process}.{moment}")


def _obey(armed: Path) -> None:
    try:
        what = armed.read_text()
        armed.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


def passed_on() -> dict[str, str]:
    """The environment variable for a process of the run that does not inherit it."""
    return {VARIABLE: _FOLDER} if _FOLDER else {}


def arm(folder: Path, process: str, moment: str, what: str = "kill") -> Path:
    """Arm a place; the file that is gone once it happened. Raises KeyError for a moment that is none."""
    assert MOMENTS[moment]
    armed = folder / f"{process}.{moment}"
    partial = armed.with_suffix(".partial")
    partial.write_text(what)
    return partial.rename(armed)
