"""ZeRO-1 and ZeRO-2 (Rajbhandari et al. 2020): every replica has all weights; the replicas divide the optimizer state.

    stage 1   moments 1/d;            the gradient is reduced into ranges once a step, after the last micro-batch
    stage 2   moments, gradient 1/d;  each micro-batch's gradient is reduced, bucket by bucket, in the backward pass
    both      each replica steps its ranges, and gathers the others', bucket by bucket

FSDP2 with reshard_after_forward=False does not replace it: between steps its weights are sharded and `fully_shard` owns
their storage, so the hybrid engine could not generate with the training shard in place, and each pass would gather the
weights again. torch's ZeroRedundancyOptimizer assigns whole parameters, so one embedding decides a rank's share; it
keeps all gradients, and broadcasts views that the hybrid engine may have moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from protocols.layout.topology import Topology
from workers.parallel.groups import COLLECTIVE_TIMEOUT
from workers.parallel.plan import Head
from workers.parallel.sharded_state import ShardedState
from workers.parallel.whole_module import WholeModule
from workers.training.offload import Copy

BUCKET_BYTES = 32 * 1024 * 1024


class _Piece(NamedTuple):
    """A parameter's place in a bucket's rows [d, width]."""

    name: str
    start: int
    width: int


class _Bucket(NamedTuple):
    """Parameters of one dtype whose ranges travel in one collective; a larger parameter is one alone."""

    pieces: tuple[_Piece, ...]
    width: int
    dtype: torch.dtype


class ZeroModel(ShardedState):
    """A ParallelModel whose replicas divide the moments (stage 1), and the gradient too (stage 2)."""

    def __init__(
        self,
        folder: str | Path,
        topology: Topology,
        *,
        stage: Literal[1, 2],
        bucket_bytes: int = BUCKET_BYTES,
        head: Head = "tokens",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: bool = False,
        timeout: timedelta = COLLECTIVE_TIMEOUT,
        module: WholeModule | None = None,
    ) -> None:
        super().__init__(
            folder, topology, head=head, dtype=dtype, device=device, recompute=recompute, timeout=timeout, module=module
        )
        self._stage = stage
        # The backward pass makes gradients from the last parameter to the first.
        self._buckets = list(self._filled(list(reversed(self._trained)), bucket_bytes))
        self._slices = {name: nn.Parameter(p.detach().new_empty(0)) for name, p in self._trained.items()}
        self._sums: list[Tensor] = []  # of the gradient, this replica's row of each bucket
        self._next = 0  # the bucket that the backward pass fills
        self._hooked = False

    @property
    def optimized(self) -> dict[str, nn.Parameter]:
        """This replica's range of each parameter [entries], a view of the weights wherever they are now."""
        for name, own in self._slices.items():
            own.data = self._range(name, self._flat(name, self._trained[name].data))
        return self._slices

    @torch.no_grad()
    def all_gather_updated(self) -> None:
        """See ParallelModel.all_gather_updated."""
        for bucket in self._buckets:
            rows = self._rows(bucket)
            for piece in bucket.pieces:
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
        for own in self._slices.values():
            own.grad = None

    def relocate(self, copy: Copy) -> int:
        """See ParallelModel.relocate."""
        for own in self._slices.values():
            own.data = own.data.new_empty(0)  # a view would keep the storage; `optimized` makes it anew
        return super().relocate(copy)

    def _flat(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 1 else super()._flat(name, tensor)  # a range is flat already

    def _width(self, name: str) -> int:
        return -(-self.plan.shard_elements(self.specs[name]) // self.topology.dp)

    def _attach_gradient(self) -> None:
        self._sums = [torch.zeros(b.width, dtype=b.dtype, device=self.device) for b in self._buckets]
        if self._stage == 1:
            super()._attach_gradient()
            return
        self._next = 0
        if not self._hooked:
            for parameter in self._trained.values():
                parameter.register_post_accumulate_grad_hook(self._arrived)
            self._hooked = True

    def _arrived(self, parameter: Tensor) -> None:
        """Sum each bucket that is complete and whose turn it is: all replicas must send them in one order."""
        while self._is_complete(self._buckets[self._next]):
            self._sum(self._next)
            self._next = (self._next + 1) % len(self._buckets)

    def _is_complete(self, bucket: _Bucket) -> bool:
        return all(self.parameters[piece.name].grad is not None for piece in bucket.pieces)

    def _sum_over_replicas(self) -> None:
        if self._stage == 1:
            for index in range(len(self._buckets)):
                self._sum(index)
            self._gradients = []
        elif left := [name for name, parameter in self._trained.items() if parameter.grad is not None]:
            raise RuntimeError(f"gradients of {left[:5]} were not summed: a parameter before them got none")
        slices = self.optimized
        for bucket, row in zip(self._buckets, self._sums, strict=True):
            for piece in bucket.pieces:
                own = slices[piece.name]
                own.grad = row[piece.start : piece.start + len(own)]

    @torch.no_grad()
    def _sum(self, index: int) -> None:
        """Add this replica's ranges of all replicas' gradients to its sums, and let the bucket's gradients go."""
        bucket = self._buckets[index]
        rows = self._rows(bucket)
        for piece in bucket.pieces:
            parameter = self.parameters[piece.name]
            assert parameter.grad is not None
            _in_ranges(self._flat(piece.name, parameter.grad), rows[:, piece.start : piece.start + piece.width])
            parameter.grad = None
        self._sums[index] += self.groups.data.sum_rows(rows)

    def _rows(self, bucket: _Bucket) -> Tensor:
        return torch.zeros(self.topology.dp, bucket.width, dtype=bucket.dtype, device=self.device)

    def _filled(self, names: list[str], limit_bytes: int) -> Iterator[_Bucket]:
        pieces: list[_Piece] = []
        width, dtype = 0, self.dtype
        for name in names:
            own, kind = self._width(name), self._trained[name].dtype
            if pieces and (kind != dtype or (width + own) * self.topology.dp * kind.itemsize > limit_bytes):
                yield _Bucket(tuple(pieces), width, dtype)
                pieces, width = [], 0
            pieces.append(_Piece(name, width, own))
            width, dtype = width + own, kind
        yield _Bucket(tuple(pieces), width, dtype)


def _in_ranges(entries: Tensor, rows: Tensor) -> None:
    """Write entries [n] into rows [d, width], range by range; what the last ones lack stays."""
    width = rows.shape[1]
    full = len(entries) // width
    rows[:full] = entries[: full * width].view(full, width)
    if rest := len(entries) - full * width:
        rows[full, :rest] = entries[full * width :]


def _from_ranges(rows: Tensor, entries: Tensor) -> None:
    """`_in_ranges`, undone."""
    width = rows.shape[1]
    full = len(entries) // width
    entries[: full * width].view(full, width).copy_(rows[:full])
    if rest := len(entries) - full * width:
        entries[full * width :] = rows[full, :rest]
