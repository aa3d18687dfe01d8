"""The table of costs: for every set of models and number of devices, the fastest layouts that fit.

Colocated models share memory: the resident state of all, the transient state of the running one, and the KV cache in
the rest. So the layouts of the other models are combined first, as a Pareto front of time against memory; then the
generating model takes its best layout beside each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product

from asyncflow.planner.costs import costs, memory
from asyncflow.planner.costs.devices import GB, Cluster, Refused
from asyncflow.planner.costs.layouts import NOTHING, Layout, LayoutChoice, divisors, pareto_front, topologies
from asyncflow.planner.costs.workload import ModelWork, Workload
from asyncflow.planner.search.mapper import Floats, Split, bounds, search, step_s, vectors_of
from protocols.layout.topology import Topology

Allows = Callable[[ModelWork, Layout], bool]


class SetCosts:
    """The best choices of every set of models, up to a cluster's size and `extra` devices beyond it.

    `allows` says which layouts of a model can be run.

    Raises Refused if a model does not fit on the cluster even alone, or if more than one generates.
    """

    def __init__(
        self,
        models: Sequence[ModelWork],
        cluster: Cluster,
        workload: Workload,
        extra: int = 0,
        allows: Allows = lambda model, layout: True,
    ) -> None:
        self.models, self.cluster, self.workload = tuple(models), cluster, workload
        self._allows = allows
        self._largest = cluster.count + extra
        generating = [index for index, model in enumerate(models) if model.generates]
        if len(generating) > 1:
            names = ", ".join(models[index].label for index in generating)
            raise Refused(f"one model generates in a step, not {len(generating)}: {names}")
        self._generating = generating[0] if generating else -1
        self._exclusive = self._exclusive_models()
        self._single = cache(self._candidates)
        self._others = cache(self._combine_others)
        self._generation = cache(self._generate)
        self.chosen = {mask: self._row(mask) for mask in range(1, 1 << len(models))}
        for index in range(len(models)):
            if self.chosen[1 << index][cluster.count] is None:
                raise Refused(self._why_not(index))
        self.table: dict[int, Floats] = {
            mask: vectors_of([choice and choice.vector for choice in row]) for mask, row in self.chosen.items()
        }

    def best(self, devices: int, keep: int = 1) -> list[Split]:
        """The best placements on a number of devices. Raises Refused if the models do not fit together."""
        table = {mask: rows[: devices + 1] for mask, rows in self.table.items()}
        try:
            return search(table, len(self.models), devices, self.workload.staleness, keep)
        except Refused:
            least = (next(n for n, c in enumerate(self.chosen[1 << i]) if c) for i in range(len(self.models)))
            alone = ", ".join(f"{m.label} from {n}" for m, n in zip(self.models, least, strict=True))
            usable = self.cluster.device.usable_bytes / GB
            raise Refused(
                f"{len(self.models)} models do not fit together on {devices} {self.cluster.device.name} of "
                f"{usable:.1f} GB usable each; alone they run on: {alone} devices"
            ) from None

    def bound_s(self, devices: int) -> float:
        """A lower bound on the seconds of a step: each stage, and the load, at its own optimum."""
        table = {mask: rows[: devices + 1] for mask, rows in self.table.items()}
        least = bounds(table, len(self.models), devices)[(1 << len(self.models)) - 1][devices]
        return float(step_s(least, self.workload.staleness))

    def parts(self, choice: LayoutChoice) -> list[tuple[ModelWork, Layout, LayoutChoice]]:
        """Split a choice: each model with its layout, its own seconds and its own bytes."""
        alone = []
        for index, layout in choice.layouts:
            model = self.models[index]
            own = self._base(model, layout.topology, layout.recompute)
            if model.generates:
                own = own._replace(generation_s=choice.generation_s)
            alone.append((model, layout, own._replace(load_s=own.total_s, layouts=((index, layout),))))
        return alone

    def cache_bytes(self, choice: LayoutChoice, layout: Layout) -> float:
        """Bytes per device left for the KV cache while the generating model of a choice runs."""
        shape = self.models[self._generating].shape
        added = memory.generation_bytes(shape, layout.topology, layout.gen_pp, layout.gen_tp)
        return self.cluster.device.usable_bytes - choice.resident - added

    def _exclusive_models(self) -> int:
        """A mask of a separate generator and its source of weights: on shared devices they would be one model."""
        if self._generating < 0 or not (source := self.models[self._generating].receives_from):
            return 0
        sources = [index for index, model in enumerate(self.models) if model.role == source]  # [] on other devices
        return 1 << self._generating | 1 << sources[0] if sources else 0

    def _row(self, mask: int) -> list[LayoutChoice | None]:
        """The fastest choice on at most n devices, for every n: devices that would slow it down stay idle."""
        row: list[LayoutChoice | None] = [None]
        for devices in range(1, self._largest + 1):
            best, fewer = self._best(mask, devices), row[-1]
            row.append(fewer if best is None or (fewer and fewer.total_s <= best.total_s) else best)
        return row

    def _best(self, mask: int, devices: int) -> LayoutChoice | None:
        """The fastest choice on exactly `devices` devices; None if the set does not fit."""
        if self._exclusive and mask & self._exclusive == self._exclusive:
            return None
        generator = 1 << self._generating if self._generating >= 0 else 0
        others = self._others(mask & ~generator, devices)
        if not mask & generator or not others:
            return others[0] if others else None
        best: LayoutChoice | None = None
        for other in others:
            for optimistic in self._single(self._generating, devices):
                if best and other.total_s + optimistic.total_s >= best.total_s:
                    break  # the optimistic times only rise from here
                real = self._beside(other, optimistic)
                if real and (best is None or real.total_s < best.total_s):
                    best = real
        return best

    def _beside(self, other: LayoutChoice, optimistic: LayoutChoice) -> LayoutChoice | None:
        """The generating model beside the others, with the KV cache that fits; None if none does."""
        usable = self.cluster.device.usable_bytes
        both = optimistic.combined(other)
        if both.peak > usable:
            return None
        layout, shape = optimistic.layouts[0][1], self.models[self._generating].shape
        pp, tp = layout.gen_pp, layout.gen_tp
        capacity = memory.kv_capacity(shape, pp, tp, self.cache_bytes(both, layout), self.workload)
        if capacity < 1:
            return None
        had, has = self._generation(pp, tp, layout.engines, None), self._generation(pp, tp, layout.engines, capacity)
        latency = both.generation_s + has.latency_s - had.latency_s
        alone = both.total_s == both.generation_s  # no other model waits for its devices while the tail drains
        load = has.load_s + latency - has.latency_s if alone else latency + both.preparation_s + both.training_s
        return both._replace(generation_s=latency, load_s=load)

    def _combine_others(self, mask: int, devices: int) -> list[LayoutChoice]:
        """Models that don't generate: the Pareto front of time against memory, fastest first."""
        if not mask:
            return [NOTHING]
        lowest = mask & -mask
        singles = self._single(lowest.bit_length() - 1, devices)
        rest = self._others(mask ^ lowest, devices)
        return pareto_front(product(singles, rest), self.cluster.device.usable_bytes)

    def _candidates(self, index: int, devices: int) -> list[LayoutChoice]:
        """Layouts of one model that fit alone, fastest first; for a generating model with an unlimited KV cache."""
        model = self.models[index]
        found = []
        for topology in topologies(model.shape, devices, self.cluster.device.devices_per_node, model.hybrid):
            for recompute in (False, True) if model.trains else (False,):
                base = self._base(model, topology, recompute)
                if base.peak <= self.cluster.device.usable_bytes:
                    found += [
                        base._replace(generation_s=seconds, layouts=((index, layout),))
                        for layout, seconds in self._generating_layouts(model, topology, recompute)
                        if self._allows(model, layout)
                    ]
        if model.generates:
            return sorted(found, key=lambda choice: choice.total_s)
        return pareto_front(((choice, NOTHING) for choice in found), self.cluster.device.usable_bytes)

    def _base(self, model: ModelWork, topology: Topology, recompute: bool) -> LayoutChoice:
        """Preparation, training and memory of a layout."""
        needs = memory.footprint(model, topology, self.workload, recompute)
        device, shape = self.cluster.device, model.shape
        once = costs.forward_s(shape, topology, self.workload, device) if model.forwards else 0.0
        trains = costs.update_s(shape, topology, self.workload, device, recompute) if model.trains else 0.0
        if model.rereads and self.workload.epochs * self.workload.mini_batches > 1:
            trains += costs.forward_s(shape, topology, self.workload, device)
        prepares = model.forwards * once
        return LayoutChoice(0.0, prepares, trains, prepares + trains, needs.resident, needs.transient, ())

    def _generating_layouts(
        self, model: ModelWork, topology: Topology, recompute: bool
    ) -> Iterator[tuple[Layout, float]]:
        """The generation layouts of a training layout, with seconds for an unlimited KV cache.

        For a model that does not generate, the training layout itself.
        """
        if not model.generates:
            yield Layout(topology, recompute), 0.0
            return
        hybrid = not model.receives_from
        for pp in divisors(topology.pp) if hybrid else (topology.pp,):
            for tp in divisors(topology.tp) if hybrid else (topology.tp,):
                layout = Layout(topology, recompute, pp, tp)
                seconds = self._generation(pp, tp, layout.engines, None).latency_s
                yield layout, seconds + self._weights_s(model, layout)

    def _weights_s(self, model: ModelWork, layout: Layout) -> float:
        """Seconds to bring a new version to the engines."""
        device, pp, tp = self.cluster.device, layout.gen_pp, layout.gen_tp
        if model.receives_from:
            return costs.publication_s(model.shape, pp, tp, device)
        return costs.transition_s(model.shape, layout.topology, pp, tp, device)

    def _generate(self, pp: int, tp: int, engines: int, capacity: float | None) -> costs.Generation:
        model = self.models[self._generating]
        rows, most = self.workload.samples * model.generates, float("inf")
        return costs.generation_s(
            model.shape, pp, tp, engines, rows, most if capacity is None else capacity, self.workload,
            self.cluster.device,
        )  # fmt: skip

    def _why_not(self, index: int) -> str:
        """Why a model does not fit alone on all devices, as a message."""
        model, device = self.models[index], self.cluster.device
        fits = [
            (needs.resident + needs.transient, str(topology), needs)
            for devices in range(1, self.cluster.count + 1)
            for topology in topologies(model.shape, devices, device.devices_per_node, model.hybrid)
            for needs in (memory.footprint(model, topology, self.workload, recompute=model.trains),)
        ]
        size, topology, needs = min(fits, key=lambda fit: fit[0])
        reason = f"its lightest layout, {topology}, needs {size / GB:.1f} GB a device ({needs})"
        if size <= device.usable_bytes:
            reason += f" and leaves no room for one sequence of {self.workload.longest_sample:.0f} tokens"
        return (
            f"{model.label} does not fit on {self.cluster}: {reason}, of {device.usable_bytes / GB:.1f} GB usable; "
            "use more or larger devices, or shorter samples"
        )
