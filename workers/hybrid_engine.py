"""One set of weights in two layouts: trained p-t-d, generated with p_g-t_g-d_g-d, switched where it stands.

    to_generation:  each shard moves to its place in the generation weights and its parameter becomes a view of them;
                    the other ranks' shards arrive around it, bucket by bucket (`sharding.transition` lists them)
    to_training:    nothing is sent; each shard leaves to a storage of its own and the generation weights are freed

No second copy of the weights exists at any time: besides them, one shard is held while it moves, and then one bucket
while it is filled.
"""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from protocols.topology import GenerationGrouping
from workers.models import Sequences, micro_batches
from workers.parallel import ParallelModel, Read
from workers.sharding.decoder import DecoderShard, flat, unflat
from workers.sharding.groups import join_groups
from workers.sharding.pipeline import Pipeline
from workers.sharding.plan import Parameter
from workers.sharding.transition import (
    Layouts,
    Move,
    exchange_groups,
    gathered_stage,
    home,
    same_index_groups,
    transition,
)

BUCKET_BYTES = 64 * 1024 * 1024


class Transition(msgspec.Struct, frozen=True):
    """What one switch to generation took on this rank."""

    received_bytes: int
    seconds: float
    peak_bytes: int  # parameters in either layout and the bucket, at their highest
    generation_bytes: int  # the weights to generate with, the training shard among them where it nests
    redundant_bytes: int  # training shards beside them


class _Shard(NamedTuple):
    """A trained parameter and its place among the gathered tensors."""

    parameter: nn.Parameter
    spec: Parameter
    start: int  # in the gathered tensor's entries


class HybridEngine:
    """The generation layout of a model that trains in another one. All ranks call its methods together.

    The grouping's style decides what is gathered: with hybridflow the generation shard; with vanilla and deepspeed the
    whole model, of which a rank then keeps its part: they are here to be compared with. `keep` leaves the generation
    weights in place while training, so that no switch but the first allocates or copies; without it, training holds
    its shards only. Raises ValueError where grouping and model don't fit.
    """

    def __init__(
        self,
        model: ParallelModel,
        grouping: GenerationGrouping,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        keep: bool = False,
    ) -> None:
        if grouping.topology != model.topology:
            raise ValueError(f"the grouping is of topology {grouping.topology}, the model trains on {model.topology}")
        if keep and grouping.style != "hybridflow":
            raise ValueError(f"grouping style {grouping.style!r} frees what it gathers: there is nothing to keep")
        self.grouping, self.place = grouping, grouping.coordinates(model.rank)
        self.weights: dict[str, nn.Parameter] = {}  # of the generation shard, by checkpoint name; empty while training
        self._model, self._keep = model, keep
        self._nests = grouping.style == "hybridflow"
        self._layouts = Layouts.of(model.plan, grouping)
        self._moves = transition(model.plan, grouping, model.rank, bucket_bytes // model.dtype.itemsize)
        join = partial(join_groups, rank=model.rank, timeout=model.timeout)
        self._groups = {g.ranks: g for g in map(join, (exchange_groups(grouping), same_index_groups(grouping)))}
        self._specs = {p.name: p for p in self._layouts.gather.parameters(gathered_stage(grouping, model.rank))}
        self._shards = {home(name, self._specs): self._shard(name) for name in model.parameters}
        self._gathered: dict[str, Tensor] = {}  # entries in memory order, by name
        self._memory = _Memory(sum(map(_bytes, model.parameters.values())))
        self.shard = DecoderShard(model.config, self._layouts.generate, self.place.pp, join(grouping.tensor_groups))
        self._stages = join(grouping.pipeline_groups)
        self._pipeline = Pipeline(self.shard, self._stages, model.dtype, model.device)

    @torch.no_grad()
    def to_generation(self) -> Transition:
        """Fill `weights` and `shard`. Raises RuntimeError while generating.

        The model's gradient is released; the model is trained again after `to_training` only.
        """
        if self.weights:
            raise RuntimeError("the hybrid engine is generating already: switch to training first")
        started = time.perf_counter()
        self._model.release_gradient()
        self._memory.peak = self._memory.held
        if not self._gathered:
            self._move_in()
        received = sum(self._receive(move) for move in self._moves)
        self.weights = self._whole() if self._nests else self._cut_down()
        self.shard.install(self.weights)
        self._wait()
        generation = sum(map(_bytes, self.weights.values()))
        held, peak = self._memory.held, self._memory.peak
        return Transition(received, time.perf_counter() - started, peak, generation, held - generation)

    @torch.no_grad()
    def to_training(self) -> None:
        """Give the weights back to training, without communication. Raises RuntimeError while training."""
        if not self.weights:
            raise RuntimeError("the hybrid engine is training already: switch to generation first")
        if not self._nests:
            for weight in self.weights.values():
                self._memory.give(weight)
        self.weights = {}
        self.shard.clear()
        if not self._keep:
            for name in list(self._gathered):
                self._move_out(name)

    def forward(self, data: Sequences, budget: int, read: Read) -> list[Tensor]:
        """What `read` keeps of each micro-batch's outputs, in order, on the last generation stage; else nothing.

        `data` are the rows of this rank's generation replica, `budget` is in padded tokens.
        """
        batches = list(micro_batches(data, budget))
        return self._pipeline.forward(batches, lambda micro, outputs: read(outputs, batches[micro]))

    @property
    def config(self) -> PretrainedConfig:
        """The whole model's."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.device

    @property
    def answers(self) -> bool:
        """Whether this rank's outputs are its generation replica's, as 3D_ALL_MICRO_DP collects them."""
        return self.shard.is_last and self.place.tp == 0

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits [n, V] after the last of `tokens` [n, L], on every rank of this generation replica.

        All of its ranks call with the same rows; each one's `cache` takes the keys and values of its own layers.
        Mask and positions as for `DecoderShard.forward`.
        """
        stages, hidden = self._stages, None
        if not self.shard.is_first:
            hidden = self._activation(*tokens.shape, self._model.plan.decoder.hidden)
            stages.receive_(hidden, self.place.pp - 1)
        states = self.shard(tokens, mask, hidden, positions=positions, cache=cache, last_only=True)
        if self.shard.is_last:
            logits = states[:, -1].contiguous()
        else:
            stages.send(states.contiguous(), self.place.pp + 1)
            logits = self._activation(len(tokens), self._model.plan.decoder.vocabulary)
        return stages.broadcast_(logits, stages.ranks[-1])

    def _activation(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._model.dtype, device=self._model.device)

    def _shard(self, name: str) -> _Shard:
        spec = next(p for p in self._model.plan.parameters(self._model.place.pp) if p.name == name)
        chunks = self._model.plan.tp // self._layouts.gather.tp
        index = self._model.place.tp % chunks if spec.cut is not None else 0
        return _Shard(self._model.parameters[name], spec, index * self._model.plan.shard_elements(spec))

    def _move_in(self) -> None:
        """Allocate what is gathered, tensor by tensor; each shard takes its place there and leaves its old storage."""
        for name, spec in self._specs.items():
            size, shard = self._layouts.gather.shard_elements(spec), self._shards.get(name)
            if shard and shard.parameter.numel() == size:  # a norm, or a shard that generates as it trains
                self._gathered[name] = flat(shard.parameter.data, shard.spec)
                continue
            self._gathered[name] = self._empty(size)
            if shard:
                self._memory.give(shard.parameter)
                self._settle(shard, self._gathered[name][shard.start : shard.start + shard.parameter.numel()])

    def _move_out(self, name: str) -> None:
        """Give a gathered tensor's shard, if the rank trains one, a storage of its own, and free the rest."""
        entries, shard = self._gathered.pop(name), self._shards.get(name)
        if shard and shard.parameter.numel() == entries.numel():
            return
        if shard:
            self._settle(shard, self._empty(shard.parameter.numel()))
        self._memory.give(entries)

    def _settle(self, shard: _Shard, place: Tensor) -> None:
        """Copy a shard to `place`, which is the parameter from now on."""
        shape = tuple(shard.parameter.shape)
        place.copy_(flat(shard.parameter.data, shard.spec))
        shard.parameter.data = unflat(place, shard.spec, shape)

    def _receive(self, move: Move) -> int:
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
        self._memory.give(rows)
        return move.received_elements(rank) * rows.itemsize

    def _spread(self, row: Tensor, move: Move, owner: int, *, outward: bool) -> None:
        """Copy an owner's pieces from the gathered tensors to its row (outward), or back."""
        start = 0
        for piece in move.pieces[owner]:
            here = row[start : start + piece.elements]
            there = self._gathered[piece.name][piece.start : piece.start + piece.elements]
            if outward:
                here.copy_(there)
            else:
                there.copy_(here)
            start += piece.elements

    def _whole(self) -> dict[str, nn.Parameter]:
        """The gathered tensors as the generation shard's parameters."""
        shape_of = self._layouts.gather.shard_shape
        return {n: _frozen(unflat(self._gathered[n], spec, shape_of(spec))) for n, spec in self._specs.items()}

    def _cut_down(self) -> dict[str, nn.Parameter]:
        """The generation shard's part of each gathered tensor, whose rest is freed."""
        plan = self._layouts.generate
        kept = {home(p.name, self._specs): p for p in plan.parameters(self.place.pp)}
        weights: dict[str, nn.Parameter] = {}
        for name in list(self._gathered):
            if spec := kept.get(name):
                size = plan.shard_elements(spec)
                start = self.place.tp * size if spec.cut is not None else 0
                part = self._gathered[name][start : start + size].clone()
                self._memory.take(part)
                weights[spec.name] = _frozen(unflat(part, spec, plan.shard_shape(spec)))
            self._move_out(name)
        return weights

    def _empty(self, *shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self._model.dtype, device=self._model.device)
        self._memory.take(tensor)
        return tensor

    def _wait(self) -> None:
        """Let the device catch up, so that the seconds are those of the transition."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


class _Memory:
    """Bytes of parameters and buckets on this rank, counted as they come and go."""

    def __init__(self, held: int) -> None:
        self.held = self.peak = held

    def take(self, tensor: Tensor) -> None:
        self.held += _bytes(tensor)
        self.peak = max(self.peak, self.held)

    def give(self, tensor: Tensor) -> None:
        self.held -= _bytes(tensor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
