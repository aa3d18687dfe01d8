"""The folder of a run that has ended, without the run: what clients read of it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from asyncflow.control.store.ledger import Ledger
from asyncflow.control.store.run_log import ENDED
from asyncflow.observe.event_file import EventFile
from protocols.control.events import Event, RunEnded, RunStarted, StateChanged

EVENTS: list[Event] = [
    RunStarted(run="done", folder="done", steps=2),
    StateChanged(state="paused"),
    StateChanged(state="running"),
    RunEnded(outcome="stopped", step=1, exit_code=130),
]


def ended_run(root: Path, name: str = "done") -> list[int]:
    """Make the folder; the cursors after its events."""
    folder = root / name
    (folder / "logs").mkdir(parents=True)
    (folder / "recipe.toml").write_text('name = "test"\nalgorithm = "ppo"\nsteps = 2\n')
    (folder / "logs" / "controller.log").write_text("the first line\nthe last line\n")
    (folder / "endpoint.json").write_text('{"token": "secret"}')
    ledger = Ledger(folder / "ledger.db")
    ledger.admit(range(4), version=0, term=0, cursor=2)
    ledger.end([(1, "failed", "why")])
    ledger.close()
    file = EventFile(folder)
    cursors = [file.append(event) for event in EVENTS]
    file.close()
    (folder / ENDED).write_bytes(msgspec.json.encode(EVENTS[-1]))
    return cursors
