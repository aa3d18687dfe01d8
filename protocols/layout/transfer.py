"""Transfer protocols: which rows each rank of a model reads, and whose outputs are collected.

A protocol is a pair of pure functions. `distribute` returns one array of row indices per rank; `collect` lists the
ranks whose outputs, concatenated in that order, are the result. The order comes from the topology, never from arrival.
Both work on row numbers only and never see a payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index as as_index
from typing import Literal, Protocol, overload

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.messages import Metrics
from protocols.data.partition import Rows, cut
from protocols.layout.topology import Coordinates, GenerationGrouping, Topology


class Distribute(Protocol):
    """The int64 row indices of each rank, in rank order; `groups` and `lengths` are int64 [rows] or None."""

    def __call__(
        self,
        rows: int,
        topology: Topology,
        *,
        generation: GenerationGrouping | None,
        groups: Rows | None,
        lengths: Rows | None,
    ) -> list[Rows]: ...


class Collect(Protocol):
    """The ranks whose outputs make up the result, in its order, each at most once."""

    def __call__(self, topology: Topology, *, generation: GenerationGrouping | None) -> Iterable[int]: ...


class TransferProtocol(msgspec.Struct, frozen=True):
    """A named pair of functions; every call checks the contracts of `Distribute` and `Collect`."""

    name: str
    distributes: Distribute
    collects: Collect

    def distribute(
        self,
        rows: int,
        topology: Topology,
        *,
        generation: GenerationGrouping | None = None,
        groups: npt.ArrayLike | None = None,
        lengths: npt.ArrayLike | None = None,
    ) -> list[Rows]:
        """One int64 array of row indices per rank of the topology, possibly empty.

        Built-in protocols partition rows with `cut`: parts are contiguous and differ by at most one row. `groups`
        [rows] keeps rows of equal value in one part; `lengths` [rows] (tokens) balances parts by their sum instead of
        by rows. Raises ValueError if the arguments, or the plan of a user's protocol, do not fit the topology.
        """
        if rows < 0:
            raise ValueError(f"{self.name}: can't distribute {rows} rows")
        _check_generation(self.name, topology, generation)
        plan = self.distributes(
            rows,
            topology,
            generation=generation,
            groups=_per_row(self.name, "groups", groups, rows),
            lengths=_per_row(self.name, "lengths", lengths, rows),
        )
        return _checked_plan(self.name, plan, rows, topology)

    def collect(self, topology: Topology, *, generation: GenerationGrouping | None = None) -> list[int]:
        """The ranks whose outputs are collected, in the order in which they are concatenated."""
        _check_generation(self.name, topology, generation)
        return _checked_ranks(self.name, self.collects(topology, generation=generation), topology)


class MetricProtocol(TransferProtocol, frozen=True):
    """A protocol whose collected outputs are metrics: they are reduced, not concatenated."""

    def reduce(self, values: npt.ArrayLike, counts: npt.ArrayLike) -> float:
        """Reduce `values` [replicas] to their mean, weighted by `counts` [replicas].

        A value with count 0, often 0/0, is ignored. The result is 0 if all counts are 0.
        """
        measured, weights = np.asarray(values, dtype=np.float64), np.asarray(counts, dtype=np.float64)
        if measured.ndim != 1 or measured.shape != weights.shape or not (weights >= 0).all():
            raise ValueError(f"{self.name}: want one value and one count >= 0 a replica, got {values} and {counts}")
        measured, weights = measured[weights > 0], weights[weights > 0]
        return float(np.average(measured, weights=weights)) if len(measured) else 0.0

    def combine(self, outputs: Sequence[Metrics]) -> Metrics:
        """Merge the metrics of all replicas: each value is the mean over the replicas that report it, by count."""
        names = dict.fromkeys(name for output in outputs for name in output.values)
        values, counts = {}, {}
        for name in names:
            reporting = [output for output in outputs if name in output.values]
            weights = [output.counts.get(name, 1.0) for output in reporting]
            values[name] = self.reduce([output.values[name] for output in reporting], weights)
            counts[name] = float(sum(weights))
        return Metrics(values=values, counts=counts)


# --- the built-in protocols: a distribute and a collect each


def _everything(rows: int, topology: Topology, **_: object) -> list[Rows]:
    return [np.arange(rows) for _ in range(topology.world_size)]


def _by_replica(rows: int, topology: Topology, *, groups: Rows | None, lengths: Rows | None, **_: object) -> list[Rows]:
    parts = cut(np.arange(rows), topology.dp, groups, lengths)
    return [parts[topology.coordinates(rank).dp] for rank in range(topology.world_size)]


def _by_micro_replica(
    rows: int,
    topology: Topology,
    *,
    generation: GenerationGrouping | None,
    groups: Rows | None,
    lengths: Rows | None,
) -> list[Rows]:
    grouping = _required(generation)
    # Partition per replica, then within it: if the rows do not divide evenly, a flat partition into dp·micro_dp parts
    # would not match the rows that 3D_PROTO gives a replica.
    parts = [
        cut(replica, grouping.micro_dp, groups, lengths)
        for replica in cut(np.arange(rows), topology.dp, groups, lengths)
    ]
    places = [grouping.coordinates(rank) for rank in range(topology.world_size)]
    return [parts[at.dp][at.micro_dp] for at in places]


def _by_rank(rows: int, topology: Topology, *, groups: Rows | None, lengths: Rows | None, **_: object) -> list[Rows]:
    return cut(np.arange(rows), topology.world_size, groups, lengths)


def _one_each(rows: int, topology: Topology, **_: object) -> list[Rows]:
    if rows != topology.world_size:
        raise ValueError(f"ALL_TO_ALL: {rows} rows for {topology.world_size} ranks; it takes exactly one row a rank")
    return [np.array([rank]) for rank in range(rows)]


def _first_only(rows: int, topology: Topology, **_: object) -> list[Rows]:
    return [np.arange(rows if rank == 0 else 0) for rank in range(topology.world_size)]


def _from_all(topology: Topology, **_: object) -> list[int]:
    return list(range(topology.world_size))


def _from_replicas(topology: Topology, **_: object) -> list[int]:
    """The rank of each replica that holds its output: last stage, tensor index 0."""
    return [topology.rank(Coordinates(topology.pp - 1, 0, dp)) for dp in range(topology.dp)]


def _from_micro_replicas(topology: Topology, *, generation: GenerationGrouping | None) -> list[int]:
    grouping = _required(generation)
    places = [(grouping.coordinates(rank), rank) for rank in range(topology.world_size)]
    leads = [(at.dp, at.micro_dp, rank) for at, rank in places if at.pp == grouping.pp - 1 and at.tp == 0]
    return [rank for _, _, rank in sorted(leads)]


def _from_stages(topology: Topology, **_: object) -> list[int]:
    return [topology.rank(Coordinates(pp, 0, 0)) for pp in range(topology.pp)]


def _from_first(topology: Topology, **_: object) -> list[int]:
    return [0]


_REGISTRY: dict[str, TransferProtocol] = {
    built_in.name: built_in
    for built_in in (
        TransferProtocol("ONE_TO_ALL", _everything, _from_all),
        TransferProtocol("3D_PROTO", _by_replica, _from_replicas),
        TransferProtocol("3D_ALL_MICRO_DP", _by_micro_replica, _from_micro_replicas),
        TransferProtocol("3D_PP_ONLY", _everything, _from_stages),
        TransferProtocol("DP_PROTO", _by_rank, _from_all),
        TransferProtocol("ALL_TO_ALL", _one_each, _from_all),
        TransferProtocol("RANK_ZERO", _first_only, _from_first),
        MetricProtocol("METRIC", _by_replica, _from_replicas),
    )
}
BUILT_IN = tuple(_REGISTRY)


@overload
def protocol(name: Literal["METRIC"]) -> MetricProtocol: ...
@overload
def protocol(name: str) -> TransferProtocol: ...
def protocol(name: str) -> TransferProtocol:
    """The transfer protocol with this name. Raises LookupError listing the names that exist."""
    found = _REGISTRY.get(name)
    if found is None:
        raise LookupError(f"no transfer protocol {name!r}; there are {', '.join(protocols())}")
    return found


def protocols() -> list[str]:
    """The names of all protocols, built-in and registered."""
    return sorted(_REGISTRY)


def register(name: str, distribute: Distribute, collect: Collect) -> TransferProtocol:
    """Register a user's protocol, so that `protocol(name)` finds it. Raises ValueError if the name is taken."""
    if name in _REGISTRY:
        raise ValueError(f"a transfer protocol {name!r} exists already; choose another name")
    return _REGISTRY.setdefault(name, TransferProtocol(name, distribute, collect))


# --- checks of arguments and plans


def _required(generation: GenerationGrouping | None) -> GenerationGrouping:
    if generation is None:
        raise ValueError("3D_ALL_MICRO_DP: pass generation=GenerationGrouping(...), micro-DP replicas depend on it")
    return generation


def _check_generation(name: str, topology: Topology, generation: GenerationGrouping | None) -> None:
    if generation is not None and generation.topology != topology:
        raise ValueError(f"{name}: the grouping is for topology {generation.topology}, the ranks have {topology}")


def _per_row(name: str, what: str, values: npt.ArrayLike | None, rows: int) -> Rows | None:
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (rows,) or (rows and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: want {what} as one integer a row, [{rows}], got {array.dtype} {list(array.shape)}")
    if what == "lengths" and rows and int(array.min()) < 0:
        raise ValueError(f"{name}: lengths holds {int(array.min())} at row {int(array.argmin())}")
    return array.astype(np.int64)


def _checked_plan(name: str, plan: Sequence[npt.ArrayLike], rows: int, topology: Topology) -> list[Rows]:
    if len(plan) != topology.world_size:
        raise ValueError(f"{name}: planned {len(plan)} parts for the {topology.world_size} ranks of {topology}")
    checked = []
    for rank, part in enumerate(plan):
        index = np.asarray(part)
        if index.ndim != 1 or (len(index) and index.dtype.kind not in "iu"):
            raise ValueError(f"{name}: rank {rank} wants flat row indices, got {index.dtype} {list(index.shape)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise ValueError(f"{name}: rank {rank} reads rows {index.min()} to {index.max()} of {rows}")
        checked.append(index.astype(np.int64, copy=False))
    return checked


def _checked_ranks(name: str, collected: Iterable[int], topology: Topology) -> list[int]:
    ranks = [as_index(rank) for rank in collected]
    for place, rank in enumerate(ranks):
        if not 0 <= rank < topology.world_size:
            raise ValueError(f"{name}: collects from rank {rank}, topology {topology} has none such")
        if rank in ranks[:place]:
            raise ValueError(f"{name}: collects from rank {rank} twice, its rows would be doubled")
    return ranks
