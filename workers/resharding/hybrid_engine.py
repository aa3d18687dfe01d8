"""One set of weights in two layouts: p-t-d for training and p_g-t_g-d_g-d for generation, switched in place.

    to_generation:  each shard is copied to its place in the generation weights, and its parameter becomes a view of
                    them; the other ranks' shards are gathered around it, bucket by bucket (see `resharding.plan`)
    to_training:    nothing is sent; each shard gets its own storage again, and the generation weights are freed
    stream:         for an engine that has its own copy: the same bytes are gathered, and freed as the engine loads them

There is never a second copy of the weights: besides them, a rank holds one shard while it is copied, and then one
bucket while it is filled. Fully sharded ranks also keep their 1/S, because torch's `fully_shard` owns that storage.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import msgspec
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from protocols.layout.topology import GenerationGrouping, Topology
from workers.data.token_rows import Sequences
from workers.parallel.decoder import DecoderShard
from workers.parallel.groups import join_groups
from workers.parallel.model import ParallelModel, Read
from workers.parallel.pipeline import Pipeline
from workers.resharding.gather import Gathering
from workers.training.micro_batches import micro_batches

BUCKET_BYTES = 64 * 1024 * 1024


class Transition(msgspec.Struct, frozen=True):
    """The cost of one switch to generation on this rank."""

    received_bytes: int
    seconds: float
    peak_bytes: int  # parameters in either layout and the bucket, at their highest
    generation_bytes: int  # the generation weights, which include the training shard where that lies inside them
    redundant_bytes: int  # training shards held outside of the generation weights
    copied_bytes: int = 0  # of the generation shard, if another engine (vLLM) has a second copy


class HybridEngine:
    """The generation layout of a model that trains in another layout. All ranks call its methods together.

    The grouping's style decides what is gathered: with hybridflow the generation shard; with vanilla and deepspeed,
    which exist for comparison, the whole model, of which a rank then keeps its part. The grouping must be of the
    model's topology; fully sharded ranks with p = t = 1 may be regrouped as S tensor ranks
    (`protocols.layout.topology`). Raises ValueError where grouping and model don't fit.
    """

    def __init__(self, model: ParallelModel, grouping: GenerationGrouping, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        _refuse_misfit(model, grouping)
        self.grouping, self.place = grouping, grouping.coordinates(model.rank)
        self.config, self.dtype, self.device = model.config, model.dtype, model.device  # of the whole model
        self.weights: dict[str, nn.Parameter] = {}  # of the generation shard, by checkpoint name; empty while training
        self._model = model
        self._gathering = Gathering(model, grouping, bucket_bytes)
        self.tensor_group = join_groups(grouping.tensor_groups, model.rank)  # they generate a replica's stage together
        self.shard = DecoderShard(model.config, self._gathering.layouts.generate, self.place.pp, self.tensor_group)
        self._stages = join_groups(grouping.pipeline_groups, model.rank)
        self._pipeline = Pipeline(self.shard, self._stages, model.dtype, model.device)

    @torch.no_grad()
    def to_generation(self) -> Transition:
        """Fill `weights` and `shard`. Raises RuntimeError in the generation layout.

        The model's gradient is freed. Train again only after `to_training`.
        """
        if self.weights:
            raise RuntimeError("the hybrid engine is generating already: switch to training first")
        started, gathering = time.perf_counter(), self._gathering
        self._model.release_gradient()
        gathering.peak = gathering.held
        gathering.attach()
        received = sum(gathering.receive(collective) for collective in gathering.collectives)
        if self.grouping.style == "hybridflow":
            tensors = {name: gathering.shard(name) for name in gathering.specs}
        else:
            tensors = gathering.keep_local_shard(self.place.pp, self.place.tp)
        self.weights = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        self.shard.install(self.weights)
        self._wait()
        generation = sum(weight.nbytes for weight in self.weights.values())
        seconds = time.perf_counter() - started
        return Transition(received, seconds, gathering.peak, generation, gathering.held - generation)

    @torch.no_grad()
    def to_training(self) -> None:
        """Restore the training layout, without communication. Raises RuntimeError in the training layout."""
        if not self.weights:
            raise RuntimeError("the hybrid engine is training already: switch to generation first")
        if self.grouping.style != "hybridflow":  # the others are views of what is gathered
            for weight in self.weights.values():
                self._gathering.count_freed(weight)
        self.weights = {}
        self.shard.clear()
        self._gathering.detach_all()

    @torch.no_grad()
    def stream(self) -> Generator[dict[str, Tensor], None, Transition]:
        """Yield the generation weights in parts, while the model stays in the training layout; returns what it took.

        Each part holds whole generation shards by checkpoint name, and is freed with the next part: a rank holds one
        bucket and the tensors that it fills. A tensor with the same shard in both layouts is the parameter itself. All
        ranks iterate together, to the end. Raises RuntimeError in the generation layout.
        """
        gathering = self._gathering
        if self.weights:
            raise RuntimeError("the hybrid engine holds generation weights: stream from the training layout")
        if self.grouping.style != "hybridflow":
            raise RuntimeError(f"grouping style {self.grouping.style!r} gathers the model whole: it is not streamed")
        started, received, gathering.peak = time.perf_counter(), 0, gathering.held
        last = {name: number for number, collective in enumerate(gathering.collectives) for name in collective.names}
        for name in gathering.specs:
            if name not in last:  # the same shard in both layouts
                yield {name: gathering.trained(name)}
        for number, collective in enumerate(gathering.collectives):
            for name in collective.names:
                if name not in gathering:
                    gathering.copy_in(name)
            received += gathering.receive(collective)
            complete = [name for name in collective.names if last[name] == number]
            yield {name: gathering.shard(name) for name in complete}
            for name in complete:
                gathering.free(name)
        self._wait()
        return Transition(received, time.perf_counter() - started, gathering.peak, 0, 0)

    def forward(self, data: Sequences, budget: int, read: Read) -> list[Tensor]:
        """`read` of each micro-batch's outputs on the last generation stage; an empty list on the others.

        `data` are the rows of this rank's generation replica, `budget` is in padded tokens.
        """
        batches = list(micro_batches(data, budget, self.device))
        return self._pipeline.forward(batches, lambda micro, outputs: read(outputs, batches[micro]))

    @property
    def is_output_rank(self) -> bool:
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
            hidden = self._activation(*tokens.shape, self._model.decoder_plan.decoder.hidden)
            stages.receive_(hidden, self.place.pp - 1)
        states = self.shard(tokens, mask, hidden, positions=positions, cache=cache, last_only=True)
        if self.shard.is_last:
            logits = states[:, -1].contiguous()
        else:
            stages.send(states.contiguous(), self.place.pp + 1)
            logits = self._activation(len(tokens), self._model.decoder_plan.decoder.vocabulary)
        return stages.broadcast_(logits, stages.ranks[-1])

    def _activation(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _wait(self) -> None:
        """Wait for the device, so that the measured seconds are those of the transition."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _refuse_misfit(model: ParallelModel, grouping: GenerationGrouping) -> None:
    if model.shares > 1 and grouping.style != "hybridflow":
        raise ValueError(f"fully sharded ranks gather by style 'hybridflow', not {grouping.style!r}")
    regrouped = Topology(1, model.topology.dp, 1) if model.shares > 1 and model.topology.replica_size == 1 else None
    if grouping.topology not in (model.topology, regrouped):
        raise ValueError(f"the grouping is of topology {grouping.topology}, the model trains on {model.topology}")
