"""Weights & Biases, online or offline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from asyncflow.observe.trackers.tables import COLUMNS, rows_of
from asyncflow.observe.trackers.tracker import TrackedRun
from protocols.control.samples import ShownSample

INIT_SECONDS = 60.0  # for the server's first answer
FINISH_SECONDS = 20.0  # for what is left to send


class Wandb:
    """Implements `Tracker`. The key comes from `wandb login` or WANDB_API_KEY, never from a recipe.

    A resumed run goes on with the same run. Its steps can't be taken back, so those of an abandoned lineage stay. An
    offline run is a folder below the run's, wandb/offline-run-*; each resume adds one, which `wandb sync --append`
    joins to the same run.
    """

    def __init__(self, entity: str = "", mode: str = "", group: str = "") -> None:
        """`mode`: "online" or "offline"; "": as WANDB_MODE says, else online. `entity`, `group`: see wandb.init."""
        if mode not in ("", "online", "offline"):
            raise ValueError(f"mode = {mode!r}: want 'online' or 'offline'")
        self._entity, self._group = entity or None, group or None
        self._mode: Literal["online", "offline"] | None = mode or None  # pyright: ignore[reportAttributeAccessIssue]
        self._run: Any = None

    def start(self, run: TrackedRun) -> int | None:
        import wandb

        self._table = wandb.Table
        mode = self._mode or os.environ.get("WANDB_MODE", "online")
        # wandb.init would ask for the key on the terminal.
        if mode == "online" and not wandb.login(prompt=False):  # pyright: ignore[reportCallIssue]
            raise RuntimeError("no key: `wandb login`, set WANDB_API_KEY, or choose mode = 'offline'")
        self._run = wandb.init(
            project=run.project,
            entity=self._entity,
            group=self._group,
            name=run.name,
            id=run.id,
            resume="allow" if mode == "online" else None,
            dir=run.folder,
            mode=self._mode,
            config=dict(run.recipe),
            reinit="create_new",  # a run of the caller's own stays as it is
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS
            ),
        )
        # Not W&B's own step, which can't be logged to twice: an evaluation comes after its step's metrics.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def texts(self, step: int, rows: Sequence[ShownSample]) -> None:
        self._run.log({"step": step, "samples": self._table(columns=list(COLUMNS), data=rows_of(step, rows))})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
