"""A model that p-t-d ranks train as one device would: losses, gradients and their norm are those of the whole batch.

    rows of a replica --micro-batches--> stage 0 --> ... --> stage p-1 --loss--> backward, 1F1B
      --> gradients: summed over d, over both ends of a tie, clipped by their global norm --> the caller's optimizer

Each rank of a replica gets the replica's rows; the rows of all replicas are the batch. Nothing is averaged: a loss
weighs its tokens by global denominators, so that sums over micro-batches and replicas are the batch's.

The ranks of a replica hold the shards of a decoder that has a sharding plan (`DecoderShard`); a replica of one rank may
hold a whole transformers module instead (`WholeModule`). One device is a topology of one rank.

Here every replica holds its weights, gradient and moments whole. `workers.parallel.zero` and
`workers.parallel.fully_sharded` divide them over the replicas. They differ in the part of a parameter that a rank's
optimizer steps (`optimized`, `local_part`, `unshard`), in how that part gets its gradient, and in what follows a step
(`all_gather_updated`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from protocols.layout.topology import Topology
from workers.data.token_rows import Sequences, TokenRows
from workers.parallel.decoder import DecoderShard, unflat
from workers.parallel.groups import ProcessGroups
from workers.parallel.pipeline import Pipeline
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Decoder, Head, Parameter, ShardPlan
from workers.parallel.shard_reader import read_shard
from workers.parallel.whole_module import WholeModule
from workers.training.lora import Adapters
from workers.training.micro_batches import MicroBatch, micro_batches
from workers.training.offload import Copy, relocated

# Of the last stage's outputs ([n, L, V] logits, or [n, L, 1] values or scores) and their micro-batch:
MicroLoss = Callable[[Tensor, MicroBatch], Tensor]  # a scalar, in global weights
Read = Callable[[Tensor, MicroBatch], Tensor]  # the part of them to keep

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": "eager"}
_FILLER = TokenRows.of([[0]], [[]])  # one token, no response


class ParallelModel:
    """One rank's part of a model, and the collective operations that all ranks of the topology call together.

    torch.distributed's world (gloo or NCCL) has the topology's ranks; one rank needs none. `folder` is a transformers
    folder, of which the rank reads its shard only. `recompute` keeps one activation per layer and computes the others
    again in the backward pass. With `module` the ranks hold that model whole, and `head`, `dtype` and `recompute` are
    the module's own. Raises ValueError, with the numbers, where model, topology and world don't fit.
    """

    def __init__(
        self,
        folder: str | Path,
        topology: Topology,
        *,
        head: Head = "tokens",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: bool = False,
        module: WholeModule | None = None,
    ) -> None:
        self.topology = topology
        self.rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if world != topology.world_size:
            raise ValueError(f"topology {topology} has {topology.world_size} ranks, torch.distributed has {world}")
        self.place = topology.coordinates(self.rank)
        self.dtype, self.device = dtype, torch.device(device)
        self.shard: DecoderShard | WholeModule
        if module is not None:
            if topology.replica_size > 1:
                raise ValueError(f"topology {topology} cuts the model, which this module holds whole: want 1-1-d")
            self.config, self.plan, self.shard = module.config, module.plan, module
            self.groups = ProcessGroups.join(topology, self.rank)
            self._read_parameters: Callable[[Container[str] | None], dict[str, Tensor]] = module.read
        else:
            self.config = AutoConfig.from_pretrained(str(folder), **_LOCAL)
            self.plan = plan = plan_of(self.config, topology, head)
            self.groups = ProcessGroups.join(topology, self.rank, plan.tied_across_stages)
            self.shard = DecoderShard(self.config, plan, self.place.pp, self.groups.tensor, recompute)
            self._read_parameters = lambda only: read_shard(
                folder, plan, self.place.pp, self.place.tp, only=only, dtype=dtype, device=device
            )
        self.specs = {spec.name: spec for spec in self.plan.parameters(self.place.pp)}
        self.parameters = self._install()  # what this rank holds of each, by name
        self._trained = {name: p for name, p in self.parameters.items() if not self.specs[name].frozen}
        self._pipeline = Pipeline(self.shard, self.groups.pipeline, dtype, self.device)
        self._gradients: list[Tensor] = []  # flat, one for each dtype

    @property
    def decoder_plan(self) -> ShardPlan:
        """The plan by which the model is cut. Raises ValueError if the ranks hold it whole."""
        if not isinstance(self.plan, ShardPlan):
            raise ValueError(f"a {self.config.model_type} held whole has no sharding plan to regroup its ranks by")
        return self.plan

    @property
    def module(self) -> PreTrainedModel:
        """transformers' own model. Raises RuntimeError if the ranks hold shards of it."""
        if not isinstance(self.shard, WholeModule):
            raise RuntimeError(f"the ranks of topology {self.topology} hold shards, none of them the whole module")
        return self.shard.model

    @property
    def adapters(self) -> Adapters | None:
        """The adapters, if only they are trained."""
        return self.shard.adapters if isinstance(self.shard, WholeModule) else None

    @property
    def shares(self) -> int:
        """Number of replicas that share each parameter: 1 where each has it whole."""
        return 1

    @property
    def optimized(self) -> dict[str, nn.Parameter]:
        """The tensors that this rank's optimizer steps, by name: here all trained parameters.

        After `backward` their `grad` is the gradient of the batch's loss.
        """
        return self._trained

    def all_gather_updated(self) -> None:
        """Call after an optimizer step: gathers the weights that other replicas have stepped."""

    def held_part(self, name: str, shard: Tensor) -> Tensor:
        """The part of a tensor in the shape of a parameter's shard that this rank holds: here all of it."""
        return shard

    def local_part(self, name: str, shard: Tensor) -> Tensor:
        """The part of a tensor in the shape of a parameter's shard that this rank's optimizer steps."""
        return shard

    def unshard(self, name: str, part: Tensor) -> Tensor:
        """The inverse of `local_part`, laid out along the cut: all replicas call, each with its part."""
        return part

    def weight(self, name: str) -> Tensor:
        """The shard of a parameter at this stage and tensor index, laid out along its cut: all replicas call."""
        return self.parameters[name].detach()

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank's outputs are its replica's, as the protocols collect them: last stage, tensor index 0."""
        return self.shard.is_last and self.place.tp == 0

    def constants(self) -> dict[str, Tensor]:
        """Persistent buffers, which are published with the weights; decoders that are cut have none."""
        return self.shard.constants() if isinstance(self.shard, WholeModule) else {}

    def freeze(self) -> None:
        """Train no parameter: the model only answers."""
        for parameter in self.shard.parameters():
            parameter.requires_grad_(False)

    def backward(self, data: Sequences, budget: int, loss: MicroLoss, together: int = 1) -> float:
        """Set every parameter's `grad` to the gradient of the batch's loss, and return that loss, on every rank.

        `data` are the rows of this replica, perhaps none; for `budget` and `together` see `micro_batches`. All replicas
        run as many micro-batches as the longest; those that have no rows left run one token of weight zero.
        """
        batches, real = self._equal_batches(data, budget, together)
        self._attach_gradient()

        def weighed(micro: int, outputs: Tensor) -> Tensor:
            return loss(outputs, batches[micro]) if micro < real else (outputs * 0.0).sum()

        total = self._pipeline.train(batches, weighed, self._end_micro_batch)
        self._reduce_gradient()
        return self.sum_over_world(total if self.is_output_rank else 0.0)

    def forward(self, data: Sequences, budget: int, read: Read) -> list[Tensor]:
        """`read` of each micro-batch's outputs, in order, on the last stage; an empty list on the others."""
        batches, real = self._equal_batches(data, budget)
        kept = self._pipeline.forward(batches, lambda i, o: read(o, batches[i]) if i < real else o.new_empty(0))
        return kept[:real]

    def outputs(self, data: Sequences, budget: int, read: Read) -> npt.NDArray[np.float32] | None:
        """`forward`, joined in host memory: float32, row after row; None before the last stage."""
        kept = self.forward(data, budget, read)
        if not self.shard.is_last:
            return None
        return torch.cat([part.float() for part in kept]).cpu().numpy() if kept else np.empty(0, np.float32)

    def clip_gradient(self, limit: float) -> float:
        """Scale the gradient to a global norm of `limit` at most; returns the norm before, on every rank.

        Parameters that several ranks hold count once. `limit` may be infinite. One rank clips as torch does.
        """
        if self.topology.world_size == 1:
            return float(nn.utils.clip_grad_norm_(self.optimized.values(), limit, foreach=False))
        gradients = {name: p.grad for name, p in self.optimized.items() if p.grad is not None}
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, gradient in gradients.items():
            if self._counts(self.specs[name]):
                squares += gradient.double().square().sum()
        norm = float(self._over_parts(self.groups.replica.sum_(squares)).sqrt())
        scale = min(1.0, limit / (norm + 1e-6))
        for gradient in gradients.values():
            gradient.mul_(scale)
        return norm

    def relocate(self, copy: Copy) -> int:
        """Replace the storage of each weight by its `copy`; returns their bytes. Between calls nothing else is held."""
        return relocated(self.parameters.values(), copy)

    def release_gradient(self) -> None:
        """Free the gradient's memory; `backward` allocates it again."""
        self._gradients = []
        for parameter in self.parameters.values():
            parameter.grad = None

    def _install(self) -> dict[str, nn.Parameter]:
        """Read this rank's shard into its module."""
        read = self._read_parameters(None)
        parameters = {name: nn.Parameter(t, requires_grad=not self.specs[name].frozen) for name, t in read.items()}
        self.shard.install(parameters)
        return parameters

    def _equal_batches(self, data: Sequences, budget: int, together: int = 1) -> tuple[list[MicroBatch], int]:
        """This replica's micro-batches, filled up to the largest number of any replica, and how many are real."""
        batches = list(micro_batches(data, budget, self.device, together))
        real = len(batches)
        most = int(self.groups.data.max_(torch.tensor(real, device=self.device)))
        return batches + [MicroBatch(_FILLER, np.arange(1), self.device) for _ in range(most - real)], real

    def _attach_gradient(self) -> None:
        """Give each parameter a gradient of 0; with several replicas views of a flat buffer, for a single collective.

        So a parameter that the loss does not reach has a gradient of 0 on every backend, and AdamW steps it.
        """
        if self.groups.data.size == 1:
            for parameter in self._trained.values():
                parameter.grad = torch.zeros_like(parameter)
            return
        if not self._gradients:
            for dtype in dict.fromkeys(parameter.dtype for parameter in self._trained.values()):
                self._attach_flat({name: p for name, p in self._trained.items() if p.dtype == dtype}, dtype)
        for gradient in self._gradients:
            gradient.zero_()

    def _attach_flat(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        sizes = [parameter.numel() for parameter in parameters.values()]
        self._gradients.append(torch.empty(sum(sizes), dtype=dtype, device=self.device))
        for (name, parameter), entries in zip(parameters.items(), self._gradients[-1].split(sizes), strict=True):
            parameter.grad = unflat(entries, self.specs[name], tuple(parameter.shape))

    def _end_micro_batch(self) -> None:
        """Follow the backward pass of a micro-batch."""

    def _sum_over_replicas(self) -> None:
        """Give `optimized` the gradients of all replicas' rows."""
        for gradient in self._gradients:
            self.groups.data.sum_(gradient)

    def _reduce_gradient(self) -> None:
        self._sum_over_replicas()
        gradients = {name: p.grad for name, p in self.optimized.items() if p.grad is not None}
        if self.groups.tensor.size > 1:
            self._sum_partial([gradients[name] for name, spec in self.specs.items() if spec.partial])
        if self.groups.tie.size > 1:
            self.groups.tie.sum_(gradients[EMBEDDING if self.shard.is_first else TOKEN_HEAD])

    def _sum_partial(self, gradients: list[Tensor]) -> None:
        """Sum the gradients of the norms that all heads share: each rank of a stage has those of its own heads only."""
        if not gradients:
            return
        together = self.groups.tensor.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, summed in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _over_parts(self, measure: Tensor) -> Tensor:
        """The sum of a measure over the replicas that divide a gradient: here each replica has all of it."""
        return measure

    def _counts(self, spec: Parameter) -> bool:
        """Whether this rank is the one that counts a parameter in the norm."""
        if spec.name == TOKEN_HEAD and self.plan.tied_across_stages:
            return False
        return spec.cut is not None or self.place.tp == 0

    def sum_over_world(self, value: float) -> float:
        """The sum of all ranks' values, on each of them. It returns when all have called."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(self.groups.data.sum_(self.groups.replica.sum_(total)))


def plan_of(config: PretrainedConfig, topology: Topology, head: Head = "tokens") -> ShardPlan:
    """How a model is cut by p and t of a topology. Raises ValueError, with the numbers, where it can't be."""
    return ShardPlan(Decoder.of(config.to_dict(), head), topology.pp, topology.tp)
