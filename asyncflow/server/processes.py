"""The processes of runs: started in sessions of their own, so that they outlive the server, and found again later."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from asyncflow.client.http import TOKEN

COMMAND = [sys.executable, "-m", "asyncflow.cli.main"]


async def start(arguments: Sequence[str], root: Path, log: Path) -> asyncio.subprocess.Process:
    """Start `asyncflow ARGUMENTS` in a folder; what it prints is appended to a log.

    It gets no token of the server's: a rule of the user's could read it.
    """
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    environment["PYTHONUNBUFFERED"] = "1"
    own = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [own, environment.get("PYTHONPATH", "")]))
    log.parent.mkdir(parents=True, exist_ok=True)
    with await asyncio.to_thread(log.open, "ab") as file:
        return await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            cwd=root,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def start_of(process: int) -> str:
    """When a process started, in the kernel's clock; "" for one that does not live."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def lives(process: int, started: str) -> bool:
    """Whether a process lives, and is no later one of the same number."""
    return bool(process and started) and start_of(process) == started


def end(process: int) -> None:
    """Ask a run's process to finish its step and end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def last_error(log: Path) -> str:
    """What a process that ended said last: its error, or its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - (1 << 16), 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else next((line for line in reversed(lines) if line.strip()), "")
