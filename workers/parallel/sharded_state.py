"""The common base of ZeRO and FSDP: each of d replicas steps one d-th of every parameter.

A parameter's entries, in memory order, are d ranges of equal width (the last ones perhaps shorter or empty), and
replica i steps range i. So a rank's state is 1/d of what it was whatever sizes the parameters have, and sums that
cross a stage's ranks or the two ends of a tie go range by range, between ranks of one replica.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from workers.parallel.decoder import flat, laid_out, unflat
from workers.parallel.model import ParallelModel
from workers.parallel.plan import Parameter


class ShardedState(ParallelModel, ABC):
    """A model whose replicas divide at least the optimizer's moments. Its constructor is ParallelModel's."""

    @abstractmethod
    def _width(self, name: str) -> int:
        """Entries in a replica's range of a parameter."""

    def _along(self, name: str) -> Parameter:
        """A parameter, cut along the dimension whose memory order its ranges follow."""
        return self.specs[name]

    def _flat(self, name: str, tensor: Tensor) -> Tensor:
        """The entries of a shard or a part, [elements]: a view where they lie in order, else a copy."""
        return flat(laid_out(tensor, self._along(name)), self._along(name))

    def _range(self, name: str, entries: Tensor) -> Tensor:
        """This replica's range of a parameter's entries: a view."""
        width = self._width(name)
        return entries[min(self.place.dp * width, len(entries)) :][:width]

    def unshard(self, name: str, part: Tensor) -> Tensor:
        """See ParallelModel.unshard."""
        spec = self.specs[name]
        rows = part.new_zeros(self.topology.dp, self._width(name))
        own = self._flat(name, part)
        rows[self.place.dp, : len(own)] = own
        entries = self.groups.data.gather_rows_(rows).view(-1)[: self.plan.shard_elements(spec)]
        return laid_out(unflat(entries, self._along(name), self.plan.shard_shape(spec)), spec)

    def _over_parts(self, measure: Tensor) -> Tensor:
        return self.groups.data.sum_(measure)
