"""What moves when ranks that trained p-t-d are to generate p_g-t_g-d_g-d: a list of collectives, byte for byte.

A rank *gathers* the shard that its generation needs (hybridflow), or the whole model, of which it keeps its part
(vanilla, deepspeed). A gathered tensor lies in memory along its cut, the shards of training one after another, the
own one among them: so a piece is a name and a range of it, which its owners read and all others write.

Matrices that are cut move inside micro-DP groups; norms, which every tensor rank has, move only between the stages of
one tensor index. So with hybridflow a rank receives, exactly, what it needs less what it owns:

    layers                          (1/(t_g p_g) - 1/(t p)) M, as `GenerationGrouping.received_bytes` says
    norms of the layers             (1/p_g - 1/p) of them
    embedding (E bytes)             (1/t_g - 1/t) E on ranks that trained it, E/t_g on others that generate with it
    final norm, head                the same
    tied, p_g = 1 < p               one matrix moves, from the first stage: the last one, which owns a copy of its
                                    shard, receives E/t_g like the stages between, E/t more than it lacks
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import msgspec

from protocols.topology import Coordinates, GenerationGrouping
from workers.sharding.plan import EMBEDDING, TOKEN_HEAD, Parameter, ShardPlan


class Piece(msgspec.Struct, frozen=True):
    """A range of a gathered tensor's entries, in memory order."""

    name: str
    start: int
    elements: int


class Move(msgspec.Struct, frozen=True):
    """One collective: each owner sends its pieces, a row of entries, to all members."""

    members: tuple[int, ...]  # global ranks
    owners: tuple[int, ...]  # the members that send: all (an all-gather), or some (a broadcast from each)
    pieces: tuple[tuple[Piece, ...], ...]  # of each owner
    width: int  # entries in a row; an owner with fewer pads

    def received_elements(self, rank: int) -> int:
        """Entries that a member receives."""
        return self.width * sum(owner != rank for owner in self.owners)


class Layouts(msgspec.Struct, frozen=True):
    """The three layouts of a transition."""

    train: ShardPlan
    gather: ShardPlan  # what the collectives bring about
    generate: ShardPlan

    @classmethod
    def of(cls, train: ShardPlan, grouping: GenerationGrouping) -> Layouts:
        """Raises ValueError where the plan is not of the grouping's topology."""
        topology = grouping.topology
        if (train.pp, train.tp) != (topology.pp, topology.tp):
            raise ValueError(f"model is cut {train.pp}-{train.tp}, the grouping's topology is {topology}")
        generate = ShardPlan(train.decoder, grouping.pp, grouping.tp)
        return cls(train, generate if grouping.style == "hybridflow" else ShardPlan(train.decoder), generate)


def exchange_groups(grouping: GenerationGrouping) -> list[list[int]]:
    """Ranks that gather cut tensors from each other: micro-DP groups; for vanilla a replica, for deepspeed all."""
    topology = grouping.topology
    if grouping.style == "hybridflow":
        return grouping.micro_dp_groups
    if grouping.style == "deepspeed":
        return [list(range(topology.world_size))]
    return GenerationGrouping(topology).micro_dp_groups


def same_index_groups(grouping: GenerationGrouping) -> list[list[int]]:
    """Ranks of an exchange group with the same tensor index: they gather what tensor ranks hold whole."""
    topology = grouping.topology
    return [
        alike
        for group in exchange_groups(grouping)
        for index in range(topology.tp)
        if (alike := [rank for rank in group if topology.coordinates(rank).tp == index])
    ]


def gathered_stage(grouping: GenerationGrouping, rank: int) -> int:
    """The stage of the gathered layout that a rank gathers."""
    return grouping.coordinates(rank).pp if grouping.style == "hybridflow" else 0


def home(name: str, gathered: Container[str]) -> str:
    """Where a trained tensor stands among gathered ones: a tied head's copy is its embedding once stages meet."""
    return EMBEDDING if name == TOKEN_HEAD and name not in gathered else name


def transition(train: ShardPlan, grouping: GenerationGrouping, rank: int, bucket_elements: int) -> list[Move]:
    """The collectives of one rank, in the order that all members of each share; a bucket bounds all rows of one.

    Raises ValueError for a bucket of less than one entry for each owner.
    """
    layouts, topology = Layouts.of(train, grouping), grouping.topology
    exchange, alike = (_own(groups(grouping), rank) for groups in (exchange_groups, same_index_groups))
    streams: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, list[Piece]]] = {}
    for parameter in layouts.gather.parameters(gathered_stage(grouping, rank)):
        members = exchange if parameter.cut is not None else alike
        holders = tuple(r for r in members if topology.coordinates(r).pp == train.stage_of(parameter))
        # Stages have equal layers, so theirs travel side by side; what one stage has alone comes from it alone.
        owners = members if _is_in_layer(parameter) else holders
        rows = streams.setdefault((members, owners), {owner: [] for owner in owners})
        for owner in holders:
            rows[owner].append(_piece(parameter, layouts, grouping, topology.coordinates(owner)))
    return [
        move
        for (members, owners), rows in streams.items()
        if len(members) > 1
        for move in _in_buckets(members, owners, rows, bucket_elements)
    ]


def _piece(parameter: Parameter, layouts: Layouts, grouping: GenerationGrouping, owner: Coordinates) -> Piece:
    """What an owner brings of a parameter: its shard, or the share of it that ZeRO leaves to a replica."""
    elements = layouts.train.shard_elements(parameter)
    chunks = layouts.train.tp // layouts.gather.tp
    start = owner.tp % chunks * elements if parameter.cut is not None else 0
    sharers = grouping.topology.dp if grouping.style == "deepspeed" else 1
    index = owner.dp if sharers > 1 else 0
    first, last = elements * index // sharers, elements * (index + 1) // sharers
    return Piece(parameter.name, start + first, last - first)


def _in_buckets(
    members: tuple[int, ...], owners: tuple[int, ...], rows: dict[int, list[Piece]], bucket_elements: int
) -> Iterator[Move]:
    width = bucket_elements // len(owners)
    if width < 1:
        raise ValueError(f"bucket of {bucket_elements} entries: {len(owners)} ranks send at least one each")
    lines = [list(_in_rows(rows[owner], width)) for owner in owners]
    for i in range(max(map(len, lines))):
        pieces = tuple(tuple(line[i]) if i < len(line) else () for line in lines)
        yield Move(members, owners, pieces, max(sum(piece.elements for piece in row) for row in pieces))


def _in_rows(pieces: Sequence[Piece], width: int) -> Iterator[list[Piece]]:
    """Cut pieces, in their order, into rows of `width` entries; the last may be shorter."""
    row: list[Piece] = []
    room = width
    for piece in pieces:
        start, left = piece.start, piece.elements
        while left:
            taken = min(room, left)
            row.append(Piece(piece.name, start, taken))
            start, left, room = start + taken, left - taken, room - taken
            if not room:
                yield row
                row, room = [], width
    if row:
        yield row


def _own(groups: list[list[int]], rank: int) -> tuple[int, ...]:
    return next(tuple(group) for group in groups if rank in group)


def _is_in_layer(parameter: Parameter) -> bool:
    return parameter.name.startswith("model.layers.")
