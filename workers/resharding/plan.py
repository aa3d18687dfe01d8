"""The collectives by which ranks that train p-t-d get the weights to generate p_g-t_g-d_g-d, byte for byte.

A rank *gathers* the shard that it needs for generation (hybridflow), or the whole model, of which it keeps its part
(vanilla, deepspeed). A gathered tensor lies in memory along its cut: the training shards one after another, this
rank's own among them. So a slice is a name and a range of entries, which its owners read and all others write.

Matrices that are cut are sent inside micro-DP groups. Norms, which every tensor rank has, are sent only between the
stages of one tensor index. So with hybridflow a rank receives exactly what it needs less what it owns:

    layers                          (1/(t_g p_g) - 1/(t p)) M, as `GenerationGrouping.received_bytes` says
    norms of the layers             (1/p_g - 1/p) of them
    embedding (E bytes)             (1/t_g - 1/t) E on ranks that trained it, E/t_g on others that generate with it
    final norm, head                the same
    tied, p_g = 1 < p               one matrix is sent, from the first stage: the last one, which owns a copy of its
                                    shard, receives E/t_g like the stages between, E/t more than it lacks

Fully sharded ranks own 1/d of each shard (S = p t d parts of a cut matrix), and gather from all replicas:

    layers                          (1/(t_g p_g) - 1/S) M
    norms of the layers             (1/p_g - 1/(p d)) of them, since tensor ranks own the same d parts
    embedding, final norm, head     likewise, with 1/d of what a rank's stage and tensor index trains

With p = t = 1 they may also regroup as S tensor ranks, and generate with any t_g that divides S.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import msgspec

from protocols.layout.topology import Coordinates, GenerationGrouping, Topology, group_ranks
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Parameter, ShardPlan


class TensorSlice(msgspec.Struct, frozen=True):
    """A range of a gathered tensor's entries, in memory order."""

    name: str
    start: int
    elements: int


class Collective(msgspec.Struct, frozen=True):
    """One collective: each owner sends its slices, as a row of entries, to all members."""

    members: tuple[int, ...]  # global ranks
    owners: tuple[int, ...]  # the members that send: all (an all-gather), or some (a broadcast from each)
    slices: tuple[tuple[TensorSlice, ...], ...]  # of each owner
    width: int  # entries in a row; an owner with fewer pads

    @property
    def names(self) -> list[str]:
        """Names of the tensors that it carries parts of, in its order."""
        return list(dict.fromkeys(part.name for row in self.slices for part in row))

    def received_elements(self, rank: int) -> int:
        """Entries that a member receives."""
        return self.width * sum(owner != rank for owner in self.owners)


class Trained(msgspec.Struct, frozen=True):
    """The owners of the weights in training: the topology, and how many replicas share a shard (1: none shares it)."""

    topology: Topology
    shares: int = 1


class Layouts(msgspec.Struct, frozen=True):
    """The three layouts of a transition."""

    train: ShardPlan
    gather: ShardPlan  # after the collectives
    generate: ShardPlan

    @classmethod
    def of(cls, train: ShardPlan, grouping: GenerationGrouping, trained: Trained | None = None) -> Layouts:
        """Raises ValueError if the plan is not of the training topology, or if the shares of a matrix don't divide."""
        topology = trained.topology if trained else grouping.topology
        if (train.pp, train.tp) != (topology.pp, topology.tp):
            raise ValueError(f"model is cut {train.pp}-{train.tp}, the grouping's topology is {topology}")
        generate = ShardPlan(train.decoder, grouping.pp, grouping.tp)
        if trained and _is_shared(grouping, trained):
            _refuse_uneven(train, trained.shares)
        return cls(train, generate if grouping.style == "hybridflow" else ShardPlan(train.decoder), generate)


def trained_by(grouping: GenerationGrouping) -> Trained:
    """The owners when the ranks train as the grouping's style assumes: in deepspeed's ZeRO each replica has a share."""
    return Trained(grouping.topology, grouping.topology.dp if grouping.style == "deepspeed" else 1)


def exchange_groups(grouping: GenerationGrouping, trained: Trained | None = None) -> list[list[int]]:
    """Ranks that gather cut tensors from each other: micro-DP groups; for vanilla a replica, for deepspeed all.

    Where replicas share the shards, all ranks that generate with the same one.
    """
    topology = grouping.topology
    if _is_shared(grouping, trained):
        return group_ranks(topology.world_size, lambda rank: ((at := grouping.coordinates(rank)).pp, at.tp))
    if grouping.style == "hybridflow":
        return grouping.micro_dp_groups
    if grouping.style == "deepspeed":
        return [list(range(topology.world_size))]
    return GenerationGrouping(topology).micro_dp_groups


def same_index_groups(grouping: GenerationGrouping, trained: Trained | None = None) -> list[list[int]]:
    """Ranks of an exchange group with the same tensor index: they gather what tensor ranks hold whole.

    Where replicas shard that too: all ranks that generate the stage and trained with this tensor index.
    """
    topology = grouping.topology
    if trained and _is_shared(grouping, trained):
        generates, trains = grouping.coordinates, trained.topology.coordinates
        return group_ranks(topology.world_size, lambda rank: (generates(rank).pp, trains(rank).tp))
    return [
        alike
        for group in exchange_groups(grouping)
        for index in range(topology.tp)
        if (alike := [rank for rank in group if topology.coordinates(rank).tp == index])
    ]


def gathered_stage(grouping: GenerationGrouping, rank: int) -> int:
    """The stage of the gathered layout that a rank gathers."""
    return grouping.coordinates(rank).pp if grouping.style == "hybridflow" else 0


def gathered_name(name: str, gathered: Container[str]) -> str:
    """The gathered tensor of a trained one: a tied head's copy is the embedding once its stages are gathered."""
    return EMBEDDING if name == TOKEN_HEAD and name not in gathered else name


def transition(
    train: ShardPlan, grouping: GenerationGrouping, rank: int, bucket_elements: int, trained: Trained | None = None
) -> list[Collective]:
    """The collectives of one rank, in an order that is the same on all members; a bucket holds all rows of one.

    `trained` is by default the grouping's topology, each replica with its shards whole. Raises ValueError for a
    bucket of less than one entry for each owner, and if the shares of a matrix don't divide.
    """
    trained = trained or trained_by(grouping)
    layouts, topology = Layouts.of(train, grouping, trained), trained.topology
    exchange, alike = (_own(groups(grouping, trained), rank) for groups in (exchange_groups, same_index_groups))
    streams: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, list[TensorSlice]]] = {}
    for parameter in layouts.gather.parameters(gathered_stage(grouping, rank)):
        members = exchange if parameter.cut is not None else alike
        holders = tuple(r for r in members if topology.coordinates(r).pp == train.stage_of(parameter))
        # All stages have as many layers, so they send at once; what only one stage has is sent by that stage.
        owners = members if _is_in_layer(parameter) else holders
        rows = streams.setdefault((members, owners), {owner: [] for owner in owners})
        for owner in holders:
            rows[owner].append(owned_slice(parameter, layouts, trained, topology.coordinates(owner)))
    return [
        collective
        for (members, owners), rows in streams.items()
        if len(members) > 1
        for collective in _in_buckets(members, owners, rows, bucket_elements)
    ]


def owned_slice(parameter: Parameter, layouts: Layouts, trained: Trained, owner: Coordinates) -> TensorSlice:
    """The slice of a parameter that an owner sends: its shard, or its replica's share of the shard."""
    elements = layouts.train.shard_elements(parameter)
    width = -(-elements // trained.shares)
    first = min(width * (owner.dp if trained.shares > 1 else 0), elements)
    size = min(width, elements - first)
    if parameter.cut is not None:  # from the whole tensor's start; then from that of the gathered part
        first = (first + owner.tp * elements) % layouts.gather.shard_elements(parameter)
    return TensorSlice(parameter.name, first, size)


def _in_buckets(
    members: tuple[int, ...], owners: tuple[int, ...], rows: dict[int, list[TensorSlice]], bucket_elements: int
) -> Iterator[Collective]:
    width = bucket_elements // len(owners)
    if width < 1:
        raise ValueError(f"bucket of {bucket_elements} entries: {len(owners)} ranks send at least one each")
    lines = [list(_in_rows(rows[owner], width)) for owner in owners]
    for i in range(max(map(len, lines))):
        slices = tuple(tuple(line[i]) if i < len(line) else () for line in lines)
        yield Collective(members, owners, slices, max(sum(part.elements for part in row) for row in slices))


def _in_rows(slices: Sequence[TensorSlice], width: int) -> Iterator[list[TensorSlice]]:
    """Cut slices, in their order, into rows of `width` entries; the last may be shorter."""
    row: list[TensorSlice] = []
    room = width
    for part in slices:
        start, left = part.start, part.elements
        while left:
            taken = min(room, left)
            row.append(TensorSlice(part.name, start, taken))
            start, left, room = start + taken, left - taken, room - taken
            if not room:
                yield row
                row, room = [], width
    if row:
        yield row


def _is_shared(grouping: GenerationGrouping, trained: Trained | None) -> bool:
    """Whether a generation shard is gathered from the shares of fully sharded ranks."""
    return trained is not None and trained.shares > 1 and grouping.style == "hybridflow"


def _refuse_uneven(train: ShardPlan, shares: int) -> None:
    """Uneven shares would not lie inside one generation shard."""
    for parameter in (p for stage in range(train.pp) for p in train.parameters(stage)):
        if parameter.cut is None:
            continue
        if (size := train.shard_shape(parameter)[parameter.cut]) % shares:
            raise ValueError(
                f"{parameter.name}: {size} rows or columns of a tensor shard don't divide over {shares} replicas; "
                "fully sharded ranks generate only where they do"
            )


def _own(groups: list[list[int]], rank: int) -> tuple[int, ...]:
    return next(tuple(group) for group in groups if rank in group)


def _is_in_layer(parameter: Parameter) -> bool:
    return parameter.name.startswith("model.layers.")
