"""How models lie on the same devices: layouts, and choices of them with their seconds and bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cache
from operator import itemgetter
from typing import NamedTuple

import msgspec

from asyncflow.planner.costs.shapes import Shape
from protocols.layout.topology import Topology


class Layout(msgspec.Struct, frozen=True):
    """How a model lies on its devices: p-t-d, and p_g-t_g where it generates."""

    topology: Topology
    recompute: bool = False
    gen_pp: int = 0
    gen_tp: int = 0

    def __str__(self) -> str:
        generation = f", generating at {self.gen_pp}-{self.gen_tp}" if self.gen_pp else ""
        return f"{self.topology}{generation}{', recomputing' if self.recompute else ''}"

    @property
    def engines(self) -> int:
        """Generation replicas."""
        return self.topology.world_size // (self.gen_pp * self.gen_tp)


class LayoutChoice(NamedTuple):
    """Layouts of a set of models on the same devices. Seconds a step, bytes a device."""

    generation_s: float
    preparation_s: float
    training_s: float
    load_s: float
    resident: float
    transient: float  # of the model that holds most while it runs
    layouts: tuple[tuple[int, Layout], ...]  # (model, layout)

    @property
    def total_s(self) -> float:
        return self.generation_s + self.preparation_s + self.training_s

    @property
    def vector(self) -> tuple[float, float, float, float]:
        return (self.generation_s, self.preparation_s, self.training_s, self.load_s)

    @property
    def peak(self) -> float:
        """Bytes a device, keys and values aside."""
        return self.resident + self.transient

    def beside(self, other: LayoutChoice) -> LayoutChoice:
        """Both on the same devices, one at a time."""
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


def topologies(shape: Shape, devices: int, tensor_limit: int) -> Iterator[Topology]:
    """Every p-t-d of exactly so many ranks: t divides the heads and stays in a node, p divides the layers."""
    for tp in divisors(shape.heads):
        for pp in divisors(shape.layers):
            if tp <= tensor_limit and devices % (pp * tp) == 0:
                yield Topology(pp, tp, devices // (pp * tp))


def pareto_front(choices: Iterable[tuple[LayoutChoice, LayoutChoice]], usable: float) -> list[LayoutChoice]:
    """Pairs that fit, as one, and that no other equals or beats in time, resident and transient memory; fastest first.

    Taken in order of time, a pair is beaten where the step it would stand on is as low: resident memory rises along
    the steps and transient memory falls.
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
        kept.append(one.beside(more))
    return kept


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Rising, 1 and the number itself among them."""
    return tuple(size for size in range(1, number + 1) if number % size == 0)
