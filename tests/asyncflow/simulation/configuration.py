"""The configuration of a simulated run: an algorithm on a placement, its sizes, and the faults."""

from __future__ import annotations

from typing import Literal

import msgspec

from asyncflow.dataflow.graph import ADVANTAGE, Dataflow
from tests.asyncflow.simulation.algorithms import ALGORITHMS

Layout = Literal["split", "mixed", "colocated", "shared"]

GENERATOR = "generator"
TRAINED = ("policy", "critic", "cost_critic")


class Faults(msgspec.Struct, frozen=True):
    """How often each kind of fault may occur in a run."""

    failures: int = 0  # a row that a stage fails to compute
    drops: int = 0  # a settled prompt that dynamic sampling filters out
    duplicates: int = 0  # a delivery that arrives twice
    losses: int = 0  # a delivery that is lost; its sender delivers again what its outbox holds for the edge
    restarts: int = 0  # a service without trained state, or an engine, dies and is replaced


class Config(msgspec.Struct, frozen=True):
    """One run.

    Layouts: "split" gives each service its own pool; "mixed" has one pool for the trained roles and one for the rest;
    "colocated" has one pool, on which the policy itself generates; "shared" has one pool with a separate generator.
    """

    algorithm: str = "ppo"
    layout: Layout = "split"
    prompts: int = 1  # P
    samples: int = 1  # n
    staleness: int = 0  # eta
    window: int = 0  # W; 0: (eta + 1) * P
    steps: int = 2
    capacity: int = 1  # rows that the mailbox of a stage with one input holds
    firing_rows: int = 4
    slots: int = 4
    replicas: int = 1
    turns: int = 1  # the most engine steps that a row takes
    stragglers: tuple[int, ...] = ()  # prompts whose rows take `turns` steps, all others one; (): random
    faults: Faults = Faults()

    def __str__(self) -> str:
        """The configuration in one line."""
        numbers = f"P={self.prompts} n={self.samples} eta={self.staleness} steps={self.steps}"
        faults = [f"{n} {f}" for f in self.faults.__struct_fields__ if (n := getattr(self.faults, f))]
        return " ".join([self.algorithm, self.layout, numbers, *faults])

    @property
    def dataflow(self) -> Dataflow:
        return ALGORITHMS[self.algorithm]

    @property
    def most_live(self) -> int:
        """The most prompts that may be live under the staleness bound."""
        return (self.staleness + 1) * self.prompts

    @property
    def rows_per_prompt(self) -> int:
        """The rows that the join holds for a prompt: its samples, and a baseline if the algorithm has one."""
        return self.samples + any(c.grain == "prompt" for c in self.dataflow.inputs_of(self.dataflow.batch_stage.name))

    @property
    def pools(self) -> dict[str, str]:
        """service -> pool."""
        services = [s for s in self.dataflow.services if s != ADVANTAGE]
        if self.layout != "colocated":
            services.append(GENERATOR)
        match self.layout:
            case "split":
                return {s: s for s in services}
            case "mixed":
                return {s: "train" if s in TRAINED else "infer" for s in services}
            case "colocated" | "shared":
                return dict.fromkeys(services, "all")
