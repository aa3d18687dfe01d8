"""trackio: a local database, a server of one's own, or a Space of Hugging Face."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from asyncflow.observe.trackers.tables import COLUMNS, rows_of
from asyncflow.observe.trackers.tracker import TrackedRun
from protocols.control.samples import ShownSample


class Trackio:
    """Implements `Tracker`. Tokens come from `hf auth login` or TRACKIO_WRITE_TOKEN, never from a recipe.

    A resumed run goes on with the run of the same name. Its steps can't be taken back, so those of an abandoned lineage
    stay. The local database is trackio's own, below TRACKIO_DIR; `trackio show` shows it.
    """

    def __init__(self, space_id: str = "", server_url: str = "") -> None:
        """`space_id`, `server_url`: see trackio.init; "": local, or as the environment says."""
        self._space_id, self._server_url = space_id or None, server_url or None
        self._run: Any = None

    def start(self, run: TrackedRun) -> int | None:
        import trackio

        for name in ("trackio", "trackio.run", "trackio.utils"):
            vars(sys.modules[name])["print"] = _say_nothing  # it would write into the live view, and has no switch
        self._table = trackio.Table
        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id[:6]}",  # it knows a run by its name alone
            resume="allow",
            config=dict(run.recipe),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
            space_id=self._space_id,
            server_url=self._server_url,
        )
        return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def texts(self, step: int, rows: Sequence[ShownSample]) -> None:
        self._run.log({"samples": self._table(columns=COLUMNS, data=rows_of(step, rows))}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _say_nothing(*_: object, **__: object) -> None:
    """In the place of print."""
