"""ZeRO-1 and ZeRO-2 (Rajbhandari et al. 2020): every replica has all weights; the replicas divide the optimizer state.

    stage 1   moments 1/d;            the gradient is reduced into ranges once a step, after the last micro-batch
    stage 2   moments, gradient 1/d;  each micro-batch's gradient is reduced, bucket by bucket, in the backward pass
    both      each replica steps its ranges, and gathers the others', bucket by bucket; in bfloat16 it has the masters
              of its ranges, gradients are reduced in float32, and the rounded weights are gathered

FSDP2 with reshard_after_forward=False does not replace it: between steps its weights are sharded and `fully_shard` owns
their storage, so the hybrid engine could not generate with the training shard in place, and each pass would gather the
weights again; and the losses of all replicas must reach the same parameters. torch's ZeroRedundancyOptimizer assigns
whole parameters, so one embedding decides a rank's share; it keeps all gradients, and broadcasts views that the hybrid
engine may have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from workers.parallel.gradients import stepped_dtype
from workers.parallel.shard_reader import ReadParameters
from workers.parallel.sharded_state import ShardedState
from workers.training.offload import Copy


class _Piece(NamedTuple):
    """A parameter's place in a bucket's rows [d, width]."""

    name: str
    start: int
    width: int


class _Bucket(NamedTuple):
    """Parameters of one dtype whose ranges are sent in one collective; a parameter beyond the limit is alone."""

    pieces: tuple[_Piece, ...]
    width: int
    dtype: torch.dtype


class Zero1Model(ShardedState):
    """A ParallelModel whose replicas divide the moments."""

    bucket_bytes: ClassVar[int] = 32 * 1024 * 1024  # of all replicas' rows of a bucket

    def _install(self, read: ReadParameters, trains: bool) -> dict[str, nn.Parameter]:
        parameters = super()._install(read, trains)
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        # The backward pass makes gradients from the last parameter to the first.
        self._buckets = list(self._filled(dict(reversed(trained.items()))))
        self._views = {n: nn.Parameter(p.detach().new_empty(0)) for n, p in trained.items() if n not in self._masters}
        self._sums: list[Tensor] = []  # of the gradient, this replica's row of each bucket
        return parameters

    @property
    def optimized(self) -> dict[str, nn.Parameter]:
        """This replica's range of each parameter [entries]: a master, or a view of the weights where they are now."""
        for name, own in self._views.items():
            own.data = self._range(name, self._flat(name, self.parameters[name].data))
        return {name: self._views[name] if name in self._views else self._masters[name] for name in self._trained}

    @torch.no_grad()
    def all_gather_updated(self) -> None:
        """See ParallelModel.all_gather_updated."""
        for bucket in self._buckets:
            rows = self._rows(bucket, bucket.dtype)
            for piece in bucket.pieces:
                own = self._masters.get(piece.name)
                if own is None:
                    own = self._range(piece.name, self._flat(piece.name, self.parameters[piece.name]))
                rows[self.place.dp, piece.start : piece.start + len(own)] = own
            self.groups.data.gather_rows_(rows)
            for piece in bucket.pieces:
                entries = self._flat(piece.name, self.parameters[piece.name])
                _from_ranges(rows[:, piece.start : piece.start + piece.width], entries)

    def local_part(self, name: str, shard: Tensor) -> Tensor:
        """See ParallelModel.local_part."""
        return self._range(name, self._flat(name, shard)).clone()

    def release_gradient(self) -> None:
        """See ParallelModel.release_gradient."""
        super().release_gradient()
        self._sums = []
        for own in self._views.values():
            own.grad = None

    def relocate(self, copy: Copy) -> int:
        """See ParallelModel.relocate."""
        for own in self._views.values():
            own.data = own.data.new_empty(0)  # a view would keep the storage; `optimized` makes it anew
        return super().relocate(copy)

    def _flat(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 1 else super()._flat(name, tensor)  # a range is flat already

    def _width(self, name: str) -> int:
        return -(-self.plan.shard_elements(self.specs[name]) // self.topology.dp)

    def _attach_gradient(self) -> None:
        self._reset_sums()
        super()._attach_gradient()

    def _sum_over_replicas(self) -> None:
        for index in range(len(self._buckets)):
            self._sum(index)
        self._gradients.release()
        self._hand_out_sums()

    def _reset_sums(self) -> None:
        self._sums = [torch.zeros(b.width, dtype=stepped_dtype(b.dtype), device=self.device) for b in self._buckets]

    def _hand_out_sums(self) -> None:
        """Give each range its part of the sums as its gradient."""
        slices = self.optimized
        for bucket, row in zip(self._buckets, self._sums, strict=True):
            for piece in bucket.pieces:
                own = slices[piece.name]
                own.grad = row[piece.start : piece.start + len(own)]

    @torch.no_grad()
    def _sum(self, index: int) -> None:
        """Add this replica's ranges of all replicas' gradients to its sums, and free the bucket's gradients.

        The gradient of a parameter that the loss has not reached counts as 0.
        """
        bucket = self._buckets[index]
        rows = self._rows(bucket, stepped_dtype(bucket.dtype))
        for piece in bucket.pieces:
            if (gradient := self._gradients.take(piece.name)) is not None:
                _in_ranges(self._flat(piece.name, gradient), rows[:, piece.start : piece.start + piece.width])
        self._sums[index] += self.groups.data.sum_rows(rows)

    def _rows(self, bucket: _Bucket, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.topology.dp, bucket.width, dtype=dtype, device=self.device)

    def _filled(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[_Bucket]:
        """Parameters in their order, in buckets of at most `bucket_bytes` over all replicas."""
        pieces: list[_Piece] = []
        width, dtype = 0, self.dtype
        for name, parameter in parameters.items():
            own, kind = self._width(name), parameter.dtype
            size = stepped_dtype(kind).itemsize
            if pieces and (kind != dtype or (width + own) * self.topology.dp * size > self.bucket_bytes):
                yield _Bucket(tuple(pieces), width, dtype)
                pieces, width = [], 0
            pieces.append(_Piece(name, width, own))
            width, dtype = width + own, kind
        yield _Bucket(tuple(pieces), width, dtype)


class Zero2Model(Zero1Model):
    """A ParallelModel whose replicas divide the moments and the gradient.

    All replicas sum all buckets once a micro-batch, in one order. Most are summed in the backward pass, as soon as
    all of their gradients have arrived. A bucket that has a parameter without gradient, such as an expert without
    tokens, and those after it are summed when the backward pass is over.
    """

    def _install(self, read: ReadParameters, trains: bool) -> dict[str, nn.Parameter]:
        parameters = super()._install(read, trains)
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._sum_complete)
        return parameters

    def _attach_gradient(self) -> None:
        self._reset_sums()
        self._next = 0  # the bucket that the backward pass fills

    def _sum_complete(self, arrived: Tensor) -> None:
        """Sum the buckets whose turn it is, as far as they are complete."""
        while self._next < len(self._buckets) and self._is_complete(self._buckets[self._next]):
            self._sum(self._next)
            self._next += 1

    def _is_complete(self, bucket: _Bucket) -> bool:
        return all(self.parameters[piece.name].grad is not None for piece in bucket.pieces)

    def _end_micro_batch(self) -> None:
        for index in range(self._next, len(self._buckets)):
            self._sum(index)
        self._next = 0

    def _sum_over_replicas(self) -> None:
        self._hand_out_sums()


def _in_ranges(entries: Tensor, rows: Tensor) -> None:
    """Write entries [n] into rows [d, width], range by range; what the last ones lack stays."""
    width = rows.shape[1]
    full = len(entries) // width
    rows[:full] = entries[: full * width].view(full, width)
    if rest := len(entries) - full * width:
        rows[full, :rest] = entries[full * width :]


def _from_ranges(rows: Tensor, entries: Tensor) -> None:
    """The inverse of `_in_ranges`."""
    width = rows.shape[1]
    full = len(entries) // width
    entries[: full * width].view(full, width).copy_(rows[:full])
    if rest := len(entries) - full * width:
        entries[full * width :] = rows[full, :rest]
