"""Draws transfer protocols as text, from their plans: the rows that each rank reads, and whose outputs are collected.

`python -m protocols.layout.draw` prints the drawings of protocols/README.md; a test compares the two.
"""

from __future__ import annotations

import sys

from protocols.data.partition import Rows
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import BUILT_IN, MetricProtocol, TransferProtocol, protocol


def draw(name: str, rows: int, topology: Topology, *, generation: GenerationGrouping | None = None) -> str:
    """The plan of one protocol: a line per rank with its coordinates, its rows, and its position in the result.

    With `generation` the coordinates in generation follow: p_g, t_g and the micro-DP index m. Raises like `protocol`,
    `distribute` and `collect`.
    """
    chosen = protocol(name)
    plan = chosen.distribute(rows, topology, generation=generation)
    sources = chosen.collect(topology, generation=generation)
    regrouped = f", generating {generation.pp}-{generation.tp} ({generation.style})" if generation else ""
    table = [_header(generation)]
    for rank, part in enumerate(plan):
        place = f"#{sources.index(rank) + 1}" if rank in sources else ""
        table.append([str(rank), *_coordinates(rank, topology, generation), _cells(part, rows), place])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
    title = f"{name}: {rows} rows on {topology}{regrouped}"
    return "\n".join([title, *lines, f"result: {_result(chosen, [plan[rank] for rank in sources])}"])


def _header(generation: GenerationGrouping | None) -> list[str]:
    return ["rank", "p t d", *(["p_g t_g m"] if generation else []), "reads", "collected"]


def _coordinates(rank: int, topology: Topology, generation: GenerationGrouping | None) -> list[str]:
    at = topology.coordinates(rank)
    columns = [f"{at.pp} {at.tp} {at.dp}"]
    if generation:
        place = generation.coordinates(rank)
        columns.append(f"{place.pp:<3} {place.tp:<3} {place.micro_dp}")
    return columns


def _cells(part: Rows, rows: int) -> str:
    """One column per row, a dot for a row that the rank does not read; unsorted rows are listed in plan order."""
    width = len(str(max(rows - 1, 0)))
    read = part.tolist()
    if read != sorted(set(read)):
        return " ".join(f"{row:>{width}}" for row in read)
    return " ".join(f"{row if row in read else '.':>{width}}" for row in range(rows))


def _result(chosen: TransferProtocol, parts: list[Rows]) -> str:
    """The collected result, for outputs with one row per row read."""
    if isinstance(chosen, MetricProtocol):
        return f"{len(parts)} metrics, reduced to one"
    rows = [row for part in parts for row in part.tolist()]
    if len(set(rows)) < len(rows):
        return f"a list of {len(parts)} outputs"
    return f"rows {' '.join(map(str, rows))}" if rows else "nothing"


def drawings() -> dict[str, str]:
    """One drawing of each built-in protocol, by name: two stages, two tensor shards, two replicas, ten rows."""
    topology = Topology(2, 2, 2)
    grouping = GenerationGrouping(topology, pp=2, tp=1)
    return {
        name: draw(
            name,
            topology.world_size if name == "ALL_TO_ALL" else 10,
            topology,
            generation=grouping if name == "3D_ALL_MICRO_DP" else None,
        )
        for name in BUILT_IN
    }


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(drawings().values()) + "\n")
