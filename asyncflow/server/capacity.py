"""Which of the waiting runs may start: as many side by side as the devices allow, in their order. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from asyncflow.recipe.config import Recipe

_GPUS = Path("/proc/driver/nvidia/gpus")


def devices_of(recipe: Recipe) -> int:
    """The devices that a run needs at once: pools never overlap. 1 where the run itself will choose its pools."""
    return sum(pool.devices for pool in recipe.pools.values()) or 1


def devices_here() -> int:
    """The devices of this machine: GPUs, or cores where there is none."""
    gpus = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    return gpus or os.cpu_count() or 1


def to_start(waiting: Iterable[tuple[str, int]], busy: int, devices: int) -> list[str]:
    """The names of the waiting runs (name, devices) that start now.

    The first one that does not fit holds up those behind it, so that none waits for ever. A run that needs more than
    there is starts alone.
    """
    starting: list[str] = []
    for name, needed in waiting:
        if busy and busy + needed > devices:
            break
        busy += needed
        starting.append(name)
    return starting
