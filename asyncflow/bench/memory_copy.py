"""The memory copy speed of this machine, measured in the same run as what it bounds."""

from __future__ import annotations

import timeit
from collections.abc import Callable

import numpy as np


def copy_speed(before_round: Callable[[], object] = lambda: None) -> float:
    """Bytes per second that one thread copies, in the fastest of five rounds.

    `before_round` runs untimed before each round, e.g. a barrier if several processes copy at the same time.
    """
    source = np.ones(64 << 20, np.uint8)
    target = np.empty_like(source)
    return source.nbytes / min(timeit.repeat(lambda: np.copyto(target, source), before_round, repeat=5, number=1))
