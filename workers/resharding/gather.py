"""What a rank gathers to generate with: the tensors, where its own shards stand in them, and the bytes that this takes.

A shard of tensor parallelism *moves in*: its place among the gathered entries becomes the parameter, so that nothing
is held twice, and it moves out again without communication. A share of a fully sharded model is *copied in*: torch's
`fully_shard` owns its storage.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from protocols.layout.topology import GenerationGrouping
from workers.parallel.decoder import flat, laid_out, unflat
from workers.parallel.groups import join_groups
from workers.parallel.model import ParallelModel
from workers.parallel.plan import Parameter
from workers.resharding.plan import (
    Collective,
    Layouts,
    Trained,
    exchange_groups,
    gathered_name,
    gathered_stage,
    owned_piece,
    same_index_groups,
    trained_by,
    transition,
)


class _Shard(NamedTuple):
    """A trained parameter and its place among the gathered tensors."""

    parameter: nn.Parameter
    spec: Parameter
    start: int  # in the gathered tensor's entries


class Gathering:
    """The gathered tensors of one rank, in memory order along their cut. All ranks call in the order of `moves`."""

    def __init__(self, model: ParallelModel, grouping: GenerationGrouping, bucket_bytes: int) -> None:
        trained = Trained(model.topology, model.shares) if model.shares > 1 else trained_by(grouping)
        self._model = model
        self.layouts = Layouts.of(model.plan, grouping, trained)
        self.moves = transition(model.plan, grouping, model.rank, bucket_bytes // model.dtype.itemsize, trained)
        self.specs = {p.name: p for p in self.layouts.gather.parameters(gathered_stage(grouping, model.rank))}
        self.held = self.peak = sum(nbytes(parameter) for parameter in model.parameters.values())
        join = partial(join_groups, rank=model.rank, timeout=model.timeout)
        partitions = [groups(grouping, trained) for groups in (exchange_groups, same_index_groups)]
        self._groups = {group.ranks: group for group in map(join, partitions)}
        self._shards = {gathered_name(name, self.specs): self._shard(name, trained) for name in model.parameters}
        self._entries: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __bool__(self) -> bool:
        return bool(self._entries)

    def trained(self, name: str) -> Tensor:
        """A parameter that generates as it trains."""
        return self._shards[name].parameter.detach()

    def attach(self) -> None:
        """Allocate what is gathered, tensor by tensor; each shard takes its place there and leaves its old storage.

        Fully sharded ranks have a copy of their part there.
        """
        for name, spec in self.specs.items():
            size, shard = self.layouts.gather.shard_elements(spec), self._shards.get(name)
            if shard and self._model.shares > 1:
                self.copy_in(name)
                continue
            if shard and shard.parameter.numel() == size:  # a norm, or a shard that generates as it trains
                self._entries[name] = flat(shard.parameter.data, shard.spec)
                continue
            self._entries[name] = self._empty(size)
            if shard:
                self._give(shard.parameter)
                self._settle(shard, self._entries[name][shard.start : shard.start + shard.parameter.numel()])

    def copy_in(self, name: str) -> None:
        """Allocate a gathered tensor, and copy what the rank trains of it to its place there."""
        self._entries[name] = self._empty(self.layouts.gather.shard_elements(self.specs[name]))
        if shard := self._shards.get(name):
            own = flat(laid_out(shard.parameter.data, shard.spec), shard.spec)
            self._entries[name][shard.start : shard.start + len(own)] = own

    def detach(self, name: str) -> None:
        """Give a gathered tensor's shard, if the rank trains one, a storage of its own, and free the rest."""
        entries, shard = self._entries.pop(name), self._shards.get(name)
        if shard and self._model.shares == 1 and shard.parameter.numel() == entries.numel():
            return
        if shard and self._model.shares == 1:
            self._settle(shard, self._empty(shard.parameter.numel()))
        self._give(entries)

    def free(self, name: str) -> None:
        """Let a gathered tensor go that was copied in."""
        self._give(self._entries.pop(name))

    def detach_all(self) -> None:
        """`detach` of every tensor."""
        for name in list(self._entries):
            self.detach(name)

    def forget(self, tensor: Tensor) -> None:
        """Count what `keep_local_shard` gave as gone."""
        self._give(tensor)

    def receive(self, move: Collective) -> int:
        """Run one collective and spread what it brought; returns the bytes received."""
        group, rank = self._groups[move.members], self._model.rank
        rows = self._empty(len(move.owners), move.width)
        if rank in move.owners:
            own = move.owners.index(rank)
            self._spread(rows[own], move, own, outward=True)
        if move.owners == move.members:
            group.gather_rows_(rows)
        else:
            for row, owner in zip(rows, move.owners, strict=True):
                group.broadcast_(row, owner)
        for index, owner in enumerate(move.owners):
            if owner != rank:
                self._spread(rows[index], move, index, outward=False)
        self._give(rows)
        return move.received_elements(rank) * rows.itemsize

    def shard(self, name: str) -> Tensor:
        """A gathered tensor in its shard's shape: a view."""
        spec = self.specs[name]
        return unflat(self._entries[name], spec, self.layouts.gather.shard_shape(spec))

    def keep_local_shard(self, stage: int, tensor_index: int) -> dict[str, Tensor]:
        """The generation shard's part of each gathered tensor, a copy by its name there; the rest is freed."""
        plan = self.layouts.generate
        kept = {gathered_name(p.name, self.specs): p for p in plan.parameters(stage)}
        weights: dict[str, Tensor] = {}
        for name in list(self._entries):
            if spec := kept.get(name):
                size = plan.shard_elements(spec)
                start = tensor_index * size if spec.cut is not None else 0
                part = self._entries[name][start : start + size].clone()
                self._take(part)
                weights[spec.name] = unflat(part, spec, plan.shard_shape(spec))
            self.detach(name)
        return weights

    def _shard(self, name: str, trained: Trained) -> _Shard:
        spec = self._model.specs[name]
        held = trained if self._model.shares > 1 else msgspec.structs.replace(trained, shares=1)
        start = owned_piece(spec, self.layouts, held, self._model.place).start
        return _Shard(self._model.parameters[name], spec, start)

    def _settle(self, shard: _Shard, place: Tensor) -> None:
        """Copy a shard to `place`, which is the parameter from now on."""
        shape = tuple(shard.parameter.shape)
        place.copy_(flat(shard.parameter.data, shard.spec))
        shard.parameter.data = unflat(place, shard.spec, shape)

    def _spread(self, row: Tensor, move: Collective, owner: int, *, outward: bool) -> None:
        """Copy an owner's pieces from the gathered tensors to its row (outward), or back."""
        start = 0
        for piece in move.pieces[owner]:
            here = row[start : start + piece.elements]
            there = self._entries[piece.name][piece.start : piece.start + piece.elements]
            if outward:
                here.copy_(there)
            else:
                there.copy_(here)
            start += piece.elements

    def _empty(self, *shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self._model.dtype, device=self._model.device)
        self._take(tensor)
        return tensor

    def _take(self, tensor: Tensor) -> None:
        self.held += nbytes(tensor)
        self.peak = max(self.peak, self.held)

    def _give(self, tensor: Tensor) -> None:
        self.held -= nbytes(tensor)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's entries."""
    return tensor.numel() * tensor.itemsize
