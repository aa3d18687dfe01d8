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

A model in bfloat16 computes and is published in bfloat16. The optimizer steps float32 master weights, with float32
gradients, and the weights are the masters' rounding: at the start, after each step, after a load. At the start a master
is the value in the model's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from protocols.layout.topology import Topology
from workers.data.token_rows import Sequences, TokenRows
from workers.parallel.decoder import DecoderShard
from workers.parallel.gradients import GradientSums, stepped_dtype, sum_together
from workers.parallel.groups import ProcessGroups
from workers.parallel.pipeline import Pipeline
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Decoder, Head, Parameter, ShardPlan
from workers.parallel.shard_reader import ReadParameters, read_shard
from workers.parallel.whole_module import WholeModule
from workers.settings import Attention
from workers.training.lora import Adapters
from workers.training.micro_batches import MicroBatch, in_row_order, micro_batches
from workers.training.models import LOCAL_ONLY
from workers.training.offload import Copy, relocated
from workers.training.outputs import Outputs

MicroLoss = Callable[[Outputs, MicroBatch], Tensor]  # a scalar, in global weights
Read = Callable[[Outputs, MicroBatch], Tensor]  # what to keep
Values = npt.NDArray[np.float32]
_FILLER = TokenRows.of([[0]], [[]])  # one token, no response


class ParallelModel:
    """One rank's part of a model, and the collective operations that all ranks of the topology call together.

    torch.distributed's world (gloo or NCCL) has the topology's ranks; one rank needs none. `folder` is a transformers
    folder, of which the rank reads its shard only. `recompute` keeps one activation per layer and computes the others
    again in the backward pass; `head_chunk` and `attention`: see `workers.settings`. Without `trains` it only answers.
    With `module` the ranks hold that model whole, and these options are its own. Raises ValueError, with the numbers,
    where model, topology and world don't fit.
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
        head_chunk: int = 0,
        attention: Attention = "sdpa",
        trains: bool = True,
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
            read: ReadParameters = module.read
        else:
            self.config = AutoConfig.from_pretrained(str(folder), attn_implementation=attention, **LOCAL_ONLY)
            self.plan = plan = plan_of(self.config, topology, head)
            self.groups = ProcessGroups.join(topology, self.rank, plan.tied_across_stages)
            self.shard = DecoderShard(self.config, plan, self.place.pp, self.groups.tensor, recompute, head_chunk)
            read = lambda only: read_shard(  # noqa: E731
                folder, plan, self.place.pp, self.place.tp, only=only,
                dtype=stepped_dtype(dtype) if trains else dtype, device=device,
            )  # fmt: skip
        self.specs = {spec.name: spec for spec in self.plan.parameters(self.place.pp)}
        self._masters: dict[str, nn.Parameter] = {}  # what is stepped of the parameters that compute in less
        self.parameters = self._install(read, trains)  # what this rank holds of each, by name
        self._trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._pipeline = Pipeline(self.shard, self.groups.pipeline, dtype, self.device)
        self._gradients = GradientSums(self._trained, self.specs, joined=self.groups.data.size > 1)

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
        """The tensors that this rank's optimizer steps, by name: here all trained parameters, or their masters.

        After `backward` their `grad` is the gradient of the batch's loss.
        """
        return self._trained | self._masters

    @property
    def updated(self) -> list[Tensor]:
        """All that an optimizer step, and `all_gather_updated` after it, change on this rank."""
        return [*self._trained.values(), *self._masters.values()]

    @torch.no_grad()
    def all_gather_updated(self) -> None:
        """Call when `optimized` has changed: rounds masters into weights, and gathers what other replicas stepped."""
        for name, master in self._masters.items():
            self.parameters[name].copy_(master)

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

    def stepped_weight(self, name: str) -> Tensor:
        """`weight` in the precision in which it is stepped: of a master, where there is one. All replicas call."""
        master = self._masters.get(name)
        return self.weight(name) if master is None else self.unshard(name, master.detach())

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank's outputs are its replica's, as the protocols collect them: last stage, tensor index 0."""
        return self.shard.is_last and self.place.tp == 0

    def constants(self) -> dict[str, Tensor]:
        """Persistent buffers, which are published with the weights; decoders that are cut have none."""
        return self.shard.constants() if isinstance(self.shard, WholeModule) else {}

    def backward(self, data: Sequences, budget: int, loss: MicroLoss, together: int = 1) -> float:
        """Set every parameter's `grad` to the gradient of the batch's loss, and return that loss, on every rank.

        `data` are the rows of this replica, perhaps none; for `budget` and `together` see `micro_batches`. All replicas
        run as many micro-batches as the longest; those that have no rows left run one token of weight zero.
        """
        batches, real = self._equal_batches(data, budget, together)
        self._attach_gradient()

        def weighed(micro: int, outputs: Outputs) -> Tensor:
            return loss(outputs, batches[micro]) if micro < real else (outputs.whole() * 0.0).sum()

        total = self._pipeline.train(batches, weighed, self._end_micro_batch)
        self._reduce_gradient()
        return self.sum_over_world(total if self.is_output_rank else 0.0)

    def forward(self, data: Sequences, budget: int, read: Read) -> list[Tensor]:
        """`read` of each micro-batch's outputs on the last stage, see `in_row_order`; an empty list on the others."""
        batches, real = self._equal_batches(data, budget)
        return self._pipeline.forward(batches, lambda i, o: read(o, batches[i]) if i < real else torch.empty(0))[:real]

    def outputs(self, data: Sequences, budget: int, read: Read, *, per_row: bool = False) -> Values | None:
        """`forward`, joined by `in_row_order` in host memory: float32; None before the last stage."""
        kept = self.forward(data, budget, read)
        if not kept:
            return np.empty(0, np.float32) if self.shard.is_last else None
        return in_row_order(kept, data, budget, per_row=per_row).float().cpu().numpy()

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
        for gradient in gradients.values():
            gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm

    def relocate(self, copy: Copy) -> int:
        """Replace the storage of each weight by its `copy`; returns their bytes. Between calls nothing else is held."""
        return relocated([*self.parameters.values(), *self._masters.values()], copy)

    def release_gradient(self) -> None:
        """Free the gradient's memory; `backward` allocates it again."""
        self._gradients.release()
        for master in self._masters.values():
            master.grad = None

    def _install(self, read: ReadParameters, trains: bool) -> dict[str, nn.Parameter]:
        """Read this rank's shard into its module, unit by unit: at most one is there in another precision too."""
        parameters: dict[str, nn.Parameter] = {}
        for _, names in self.shard.units():
            for name, tensor in read(names).items():
                trained = trains and not self.specs[name].frozen
                parameters[name] = nn.Parameter(tensor.to(self._dtype_of(name)), requires_grad=trained)
                if trained and parameters[name].dtype != tensor.dtype:
                    self._masters[name] = nn.Parameter(self.local_part(name, tensor))
        self.shard.install(parameters)
        return {name: parameters[name] for name in self.specs}

    def _dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a parameter computes."""
        return self.shard.dtypes[name] if isinstance(self.shard, WholeModule) else self.dtype

    def _equal_batches(self, data: Sequences, budget: int, together: int = 1) -> tuple[list[MicroBatch], int]:
        """This replica's micro-batches, filled up to the largest number of any replica, and how many are real."""
        batches = list(micro_batches(data, budget, self.device, together))
        most = int(self.groups.data.max_(torch.tensor(real := len(batches), device=self.device)))
        return batches + [MicroBatch(_FILLER, np.arange(1), self.device) for _ in range(most - real)], real

    def _attach_gradient(self) -> None:
        """Make room for the sums of the micro-batches' gradients."""
        self._gradients.attach()

    def _end_micro_batch(self) -> None:
        """Follow the backward pass of a micro-batch."""

    def _sum_over_replicas(self) -> None:
        """Give `optimized` the gradients of all replicas' rows."""
        for gradient in self._gradients.buffers:
            self.groups.data.sum_(gradient)
        for name, gradient in self._gradients.beside().items():
            self._masters[name].grad = gradient

    def _reduce_gradient(self) -> None:
        self._sum_over_replicas()
        gradients = {name: p.grad for name, p in self.optimized.items() if p.grad is not None}
        if self.groups.tensor.size > 1:
            sum_together([gradients[name] for name, spec in self.specs.items() if spec.partial], self.groups.tensor)
        if self.groups.tie.size > 1:
            self.groups.tie.sum_(gradients[EMBEDDING if self.shard.is_first else TOKEN_HEAD])

    def _over_parts(self, measure: Tensor) -> Tensor:
        """The sum of a measure over the replicas that divide a gradient: here each has all of it."""
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
