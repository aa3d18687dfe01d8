"""The tensors that a rank gathers for generation, the places of its own shards in them, and the bytes that they take.

A tensor-parallel shard is *attached*: the parameter becomes a view of its place among the gathered entries, so that
nothing is held twice, and it is detached again without communication. A share of a fully sharded model is *copied in*,
because torch's `fully_shard` owns its storage.
"""

from __future__ import annotations

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
    owned_slice,
    same_index_groups,
    trained_by,
    transition,
)


class _Shard(NamedTuple):
    """A parameter in the training layout, and its place in a gathered tensor."""

    parameter: nn.Parameter
    spec: Parameter
    start: int  # in the gathered tensor's entries


class Gathering:
    """The gathered tensors of one rank, in memory order along their cut. All ranks run `collectives` in their order."""

    def __init__(self, model: ParallelModel, grouping: GenerationGrouping, bucket_bytes: int) -> None:
        trained = Trained(model.topology, model.shares) if model.shares > 1 else trained_by(grouping)
        self._model = model
        self.layouts = Layouts.of(model.decoder_plan, grouping, trained)
        self.collectives = transition(
            model.decoder_plan, grouping, model.rank, bucket_bytes // model.dtype.itemsize, trained
        )
        self.specs = {p.name: p for p in self.layouts.gather.parameters(gathered_stage(grouping, model.rank))}
        self.held = self.peak = sum(parameter.nbytes for parameter in model.parameters.values())
        partitions = [groups(grouping, trained) for groups in (exchange_groups, same_index_groups)]
        self._groups = {group.ranks: group for group in (join_groups(ranks, model.rank) for ranks in partitions)}
        self._shards = {gathered_name(name, self.specs): self._shard(name, trained) for name in model.parameters}
        self._entries: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def trained(self, name: str) -> Tensor:
        """A parameter whose shard is the same in both layouts, in the dtype in which it computes."""
        return self._shards[name].parameter.detach().to(self._model.dtype)

    def attach(self) -> None:
        """Allocate the gathered tensors one by one; each shard is copied to its place there and frees its old storage.

        Fully sharded ranks keep their shares and have a copy there.
        """
        for name, spec in self.specs.items():
            size, shard = self.layouts.gather.shard_elements(spec), self._shards.get(name)
            if shard and self._model.shares > 1:
                self.copy_in(name)
                continue
            if shard and shard.parameter.numel() == size:  # a norm, or a shard that is the same in both layouts
                self._entries[name] = flat(shard.parameter.data, shard.spec)
                continue
            self._entries[name] = self._empty(size)
            if shard:
                self.count_freed(shard.parameter)
                self._move_to(shard, self._entries[name][shard.start : shard.start + shard.parameter.numel()])

    def copy_in(self, name: str) -> None:
        """Allocate a gathered tensor, and copy this rank's own part to its place there."""
        self._entries[name] = self._empty(self.layouts.gather.shard_elements(self.specs[name]))
        if shard := self._shards.get(name):
            own = flat(laid_out(shard.parameter.data, shard.spec), shard.spec)
            self._entries[name][shard.start : shard.start + len(own)] = own

    def detach(self, name: str) -> None:
        """Move this rank's shard of a gathered tensor, if it has one, to its own storage, and free the rest."""
        entries, shard = self._entries.pop(name), self._shards.get(name)
        if shard and self._model.shares == 1 and shard.parameter.numel() == entries.numel():
            return
        if shard and self._model.shares == 1:
            self._move_to(shard, self._empty(shard.parameter.numel()))
        self.count_freed(entries)

    def free(self, name: str) -> None:
        """Free a gathered tensor that was copied in."""
        self.count_freed(self._entries.pop(name))

    def detach_all(self) -> None:
        """`detach` of every tensor."""
        for name in list(self._entries):
            self.detach(name)

    def count_freed(self, tensor: Tensor) -> None:
        """Count a tensor as no longer held: one that `keep_local_shard` returned, or this object's own."""
        self.held -= tensor.nbytes

    def receive(self, collective: Collective) -> int:
        """Run one collective and copy what arrived to its place; returns the bytes received."""
        group, rank = self._groups[collective.members], self._model.rank
        rows = self._empty(len(collective.owners), collective.width)
        if rank in collective.owners:
            own = collective.owners.index(rank)
            self._copy_row(rows[own], collective, own, outward=True)
        if collective.owners == collective.members:
            group.gather_rows_(rows)
        else:
            for row, owner in zip(rows, collective.owners, strict=True):
                group.broadcast_(row, owner)
        for index, owner in enumerate(collective.owners):
            if owner != rank:
                self._copy_row(rows[index], collective, index, outward=False)
        self.count_freed(rows)
        return collective.received_elements(rank) * rows.itemsize

    def shard(self, name: str) -> Tensor:
        """A gathered tensor in its shard's shape: a view."""
        spec = self.specs[name]
        return unflat(self._entries[name], spec, self.layouts.gather.shard_shape(spec))

    def keep_local_shard(self, stage: int, tensor_index: int) -> dict[str, Tensor]:
        """A copy of the generation shard's part of each gathered tensor, by checkpoint name; the rest is freed."""
        plan = self.layouts.generate
        local = {gathered_name(p.name, self.specs): p for p in plan.parameters(stage)}
        weights: dict[str, Tensor] = {}
        for name in list(self._entries):
            if spec := local.get(name):
                size = plan.shard_elements(spec)
                start = tensor_index * size if spec.cut is not None else 0
                part = self._entries[name][start : start + size].clone()
                self._count_held(part)
                weights[spec.name] = unflat(part, spec, plan.shard_shape(spec))
            self.detach(name)
        return weights

    def _shard(self, name: str, trained: Trained) -> _Shard:
        spec = self._model.specs[name]
        held = trained if self._model.shares > 1 else msgspec.structs.replace(trained, shares=1)
        start = owned_slice(spec, self.layouts, held, self._model.place).start
        return _Shard(self._model.parameters[name], spec, start)

    def _move_to(self, shard: _Shard, place: Tensor) -> None:
        """Copy a shard to `place`, which is the parameter's storage from now on."""
        shape = tuple(shard.parameter.shape)
        place.copy_(flat(shard.parameter.data, shard.spec))
        shard.parameter.data = unflat(place, shard.spec, shape)

    def _copy_row(self, row: Tensor, collective: Collective, owner: int, *, outward: bool) -> None:
        """Copy an owner's slices from the gathered tensors to its row (outward), or back."""
        start = 0
        for part in collective.slices[owner]:
            here = row[start : start + part.elements]
            there = self._entries[part.name][part.start : part.start + part.elements]
            if outward:
                here.copy_(there)
            else:
                there.copy_(here)
            start += part.elements

    def _empty(self, *shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self._model.dtype, device=self._model.device)
        self._count_held(tensor)
        return tensor

    def _count_held(self, tensor: Tensor) -> None:
        self.held += tensor.nbytes
        self.peak = max(self.peak, self.held)
