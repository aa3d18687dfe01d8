"""StartProgress: how far the start of a run is, for who waits for it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from asyncflow.services.runtime import Load


class StartProgress(msgspec.Struct):
    """Written by `launch` and `resume`, and read at any time."""

    phase: str = "checks the recipe"  # what the start does now
    began: float = msgspec.field(default_factory=time.monotonic)
    loads: Mapping[str, Load] = {}  # by service, in the order in which they begin

    def enter(self, phase: str, loads: Mapping[str, Load] | None = None) -> None:
        """Begin another phase; `loads`: the services that it loads, which change while it lasts."""
        self.phase = phase
        if loads is not None:
            self.loads = loads
