"""Fully sharded data parallelism (ZeRO-3) by torch's `fully_shard`: weights, gradient and moments divided over d.

Each layer is gathered before it computes and freed after it, in the backward pass again; all other parameters are one
more unit. A rank holds 1/(p t d) of the model, plus one unit's weights and gradient.

Matrices are divided along the dimension that tensor parallelism cuts, so that a replica's range of a shard is a finer
tensor shard. This lets the hybrid engine gather a generation shard from only the ranks that own a part of it. A whole
module has no such dimension: its parameters are divided by rows.

In bfloat16 a rank's part is the float32 master: `fully_shard` rounds it before it gathers a layer, and sums gradients
in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from workers.data.token_rows import Sequences
from workers.parallel.decoder import unflat
from workers.parallel.gradients import stepped_dtype
from workers.parallel.model import MicroLoss, Read
from workers.parallel.plan import Parameter
from workers.parallel.shard_reader import ReadParameters
from workers.parallel.sharded_state import ShardedState
from workers.training.offload import Copy


class FullyShardedModel(ShardedState):
    """A ParallelModel whose replicas divide all of their state. It needs two replicas or more.

    `parameters` are this rank's parts, [rows / d, ...] along the dimension that is divided, as they are stepped. The
    losses of all replicas must reach the same parameters: `fully_shard` sums a layer's gradients in one collective, of
    those that are there.
    """

    @property
    def shares(self) -> int:
        """See ParallelModel.shares."""
        return self.topology.dp

    def weight(self, name: str) -> Tensor:
        """See ParallelModel.weight."""
        return self.unshard(name, self.parameters[name].detach().to(self._dtype_of(name)))

    def stepped_weight(self, name: str) -> Tensor:
        """See ParallelModel.stepped_weight."""
        return self.unshard(name, self.parameters[name].detach())

    def held_part(self, name: str, shard: Tensor) -> Tensor:
        """See ParallelModel.held_part."""
        return self.local_part(name, shard)

    def local_part(self, name: str, shard: Tensor) -> Tensor:
        """See ParallelModel.local_part."""
        along = self._along(name)
        dim = along.cut or 0
        entries = self._range(name, self._flat(name, shard))
        rows = len(entries) // (shard.numel() // shard.shape[dim])
        return unflat(entries.clone(), along, tuple(rows if i == dim else n for i, n in enumerate(shard.shape)))

    def backward(self, data: Sequences, budget: int, loss: MicroLoss, together: int = 1) -> float:
        """See ParallelModel.backward."""
        try:
            return super().backward(data, budget, loss, together)
        except BaseException:
            self._reset_after_failure()
            raise

    def forward(self, data: Sequences, budget: int, read: Read) -> list[Tensor]:
        """See ParallelModel.forward."""
        try:
            return super().forward(data, budget, read)
        except BaseException:
            self._reset_after_failure()
            raise

    def release_gradient(self) -> None:
        """See ParallelModel.release_gradient."""
        super().release_gradient()
        for sharded in self._sharded.values():
            sharded.grad = None

    def relocate(self, copy: Copy) -> int:
        """See ParallelModel.relocate. torch moves what it has divided; the parts are views of that."""
        self.shard._apply(copy)
        for name, own in self.parameters.items():
            own.data = _own_part(self._sharded[name])
        return sum(own.nbytes for own in self.parameters.values())

    def _reset_after_failure(self) -> None:
        """Reset FSDP's state after a pass that raised: the step is refused, and the model must remain usable."""
        if reset := getattr(self.shard, "reset_iter_state", None):  # older torch does not have it
            reset()

    def _along(self, name: str) -> Parameter:
        spec = self.specs[name]
        divides = spec.cut is not None and self.plan.shard_shape(spec)[spec.cut] % self.topology.dp == 0
        return spec if divides else msgspec.structs.replace(spec, cut=0)  # torch divides others unevenly, by rows only

    def _width(self, name: str) -> int:
        shape, dim = self.plan.shard_shape(self.specs[name]), self._along(name).cut or 0
        return -(-shape[dim] // self.topology.dp) * (self.plan.shard_elements(self.specs[name]) // shape[dim])

    def _install(self, read: ReadParameters, trains: bool) -> dict[str, nn.Parameter]:
        """Read and divide one unit after another, so that at most one is ever whole on the device."""
        group = self.groups.data.process_group
        if group is None:
            raise ValueError(f"topology {self.topology} has one replica: there is nothing to shard the model over")
        mesh = DeviceMesh.from_group(group, self.device.type)
        for module, names in self.shard.units():
            own = {  # torch takes contiguous parameters only
                name: nn.Parameter(tensor.contiguous(), requires_grad=trains and not self.specs[name].frozen)
                for name, tensor in read(names).items()
            }
            self.shard.install(own, names)
            dims = {id(parameter): self._along(name).cut or 0 for name, parameter in own.items()}
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=True,
                mp_policy=self._precision(own),
                shard_placement_fn=lambda parameter, dims=dims: Shard(dims[id(parameter)]),
            )
        for module in self.shard.modules():
            if isinstance(module, FSDPModule):  # gradients are sums over replicas, not means
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._sharded = self.shard.by_name()
        return {
            name: nn.Parameter(_own_part(self._sharded[name]), requires_grad=trains and not spec.frozen)
            for name, spec in self.specs.items()
        }

    def _precision(self, unit: Mapping[str, nn.Parameter]) -> MixedPrecisionPolicy:
        """How a unit computes: as its parameters are, unless those are masters of weights in less."""
        if all(parameter.dtype == self._dtype_of(name) for name, parameter in unit.items()):
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(self.dtype, stepped_dtype(self.dtype), cast_forward_inputs=False)

    def _attach_gradient(self) -> None:
        self.release_gradient()

    @torch.no_grad()
    def _sum_over_replicas(self) -> None:
        """`fully_shard` has summed the gradients; assign them to the parts."""
        for name, own in self._trained.items():
            gradient = self._sharded[name].grad
            own.grad = torch.zeros_like(own) if gradient is None else _local(gradient)


def _own_part(sharded: nn.Parameter) -> Tensor:
    """This rank's part of a divided parameter: its storage."""
    return _local(sharded.detach())


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
