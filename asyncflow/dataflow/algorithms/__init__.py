"""The algorithms by name: a file and a line here each."""

from __future__ import annotations

from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.trace import Algorithm

ALGORITHMS: dict[str, Algorithm] = {"ppo": ppo}
