"""TensorBoard: an event file in the run's folder, written without torch and without TensorFlow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.observe.trackers.tables import markdown_of
from asyncflow.observe.trackers.tracker import TrackedRun
from protocols.control.samples import ShownSample


class TensorBoard:
    """Implements `Tracker`. `tensorboard --logdir runs` shows all runs below a folder.

    A resumed run gets an event file that tells TensorBoard to drop the steps after the one from which it goes on.
    """

    def __init__(self, folder: str = "") -> None:
        """`folder` of the event files; "": tensorboard/ in the run's folder."""
        self._folder = folder
        self._writer: Any = None

    def start(self, run: TrackedRun) -> int | None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events: Any = event_pb2  # made at run time: a type checker sees nothing in them
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._text = text_pb
        folder = Path(self._folder) / run.name if self._folder else Path(run.folder) / "tensorboard"
        self._writer = EventFileWriter(str(folder))
        session = events.SessionLog(status=events.SessionLog.START)
        self._add(run.first_step + 1, session_log=session)  # readers drop earlier files' steps from this one on
        recipe = msgspec.json.format(msgspec.json.encode(run.recipe), indent=2).decode()
        self._add(run.first_step + 1, summary=text_pb("recipe", f"```\n{recipe}\n```"))
        self._writer.flush()
        return run.first_step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # The older form of a scalar: every reader knows it, and drops the ones that a resumed run replaces.
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=self._summary(value=values))
        self._writer.flush()

    def texts(self, step: int, rows: Sequence[ShownSample]) -> None:
        self._add(step, summary=self._text("samples", markdown_of(step, rows)))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))
