"""Parallel layouts of models, and choices of layouts for models that share devices, with their time and memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cache
from operator import itemgetter
from typing import NamedTuple

import msgspec

from asyncflow.planner.costs.shapes import Shape
from protocols.layout.topology import Topology
from workers.parallel.plan import indivisible


class Layout(msgspec.Struct, frozen=True):
    """The parallel sizes of a model: p-t-d, and p_g-t_g if it generates."""

    topology: Topology
    recompute: bool = False
    gen_pp: int = 0
    gen_tp: int = 0

    def __str__(self) -> str:
        generation = f", generating at {self.gen_pp}-{self.gen_tp}" if self.gen_pp else ""
        return f"{self.topology}{generation}{', recomputing' if self.recompute else ''}"

    @property
    def engines(self) -> int:
        """The number of generation replicas."""
        return self.topology.world_size // (self.gen_pp * self.gen_tp)


class LayoutChoice(NamedTuple):
    """Layouts of a set of models that share devices, with seconds per step and bytes per device."""

    generation_s: float
    preparation_s: float
    training_s: float
    load_s: float
    resident: float
    transient: float  # of the model that needs most while it runs
    layouts: tuple[tuple[int, Layout], ...]  # (model, layout)

    @property
    def total_s(self) -> float:
        return self.generation_s + self.preparation_s + self.training_s

    @property
    def vector(self) -> tuple[float, float, float, float]:
        return (self.generation_s, self.preparation_s, self.training_s, self.load_s)

    @property
    def peak(self) -> float:
        """Bytes per device, without the KV cache."""
        return self.resident + self.transient

    def combined(self, other: LayoutChoice) -> LayoutChoice:
        """Both choices together on the same devices, which run one model at a time."""
        return LayoutChoice(
            generation_s=self.generation_s + other.generation_s,
            preparation_s=self.preparation_s + other.preparation_s,
            training_s=self.training_s + other.training_s,
            load_s=self.load_s + other.load_s,
            resident=self.resident + other.resident,
            transient=max(self.transient, other.transient),
            layouts=self.layouts + other.layouts,
        )


NOTHING = LayoutChoice(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, ())


def topologies(shape: Shape, devices: int, tensor_limit: int, hybrid: bool = False) -> Iterator[Topology]:
    """Every p-t-d of exactly `devices` ranks that a model can be built on, with tensor shards inside one node.

    A family without a sharding plan is whole on each rank. `hybrid`: the ranks that train the model also generate with
    it; without a plan that takes one device.
    """
    for tp in divisors(devices):
        for pp in divisors(devices // tp):
            whole = pp == tp == 1 and (shape.shardable or not hybrid or devices == 1)
            if whole or (tp <= tensor_limit and shape.shardable and not indivisible(shape, pp, tp)):
                yield Topology(pp, tp, devices // (pp * tp))


def pareto_front(choices: Iterable[tuple[LayoutChoice, LayoutChoice]], usable: float) -> list[LayoutChoice]:
    """The Pareto front of pairs that fit, each joined into one choice, fastest first.

    A pair is dropped if another one is at least as good in time, resident memory and transient memory. Pairs are taken
    in order of time; those kept so far form a staircase, along which resident memory rises and transient memory falls.
    """
    keyed = [
        (one.total_s + more.total_s, one.resident + more.resident, max(one.transient, more.transient), one, more)
        for one, more in choices
    ]
    kept: list[LayoutChoice] = []
    residents: list[float] = []
    transients: list[float] = []
    for _, resident, transient, one, more in sorted(keyed, key=itemgetter(0, 1, 2)):
        place = bisect_right(residents, resident)
        if resident + transient > usable or (place and transients[place - 1] <= transient):
            continue
        end = place
        while end < len(transients) and transients[end] >= transient:
            end += 1
        residents[place:end], transients[place:end] = [resident], [transient]
        kept.append(one.combined(more))
    return kept


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, in rising order."""
    return tuple(size for size in range(1, number + 1) if number % size == 0)
