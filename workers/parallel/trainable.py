"""A model trained by p-t-d ranks, with its optimizer: the state that a checkpoint holds and that rolls back together.

What `TrainedModel` is to one process. All ranks call each method together, each with its own replica's rows; whatever
is refused is refused on all of them, since they see the same loss and the same norm.

Each rank's AdamW has the moments of what it steps: its shard, or its replica's part of that. A checkpoint is written
in shards by the first replica and read under any topology and backend; a publication or an export is collected by
rank 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from protocols.data.columns import B, Batch, Jagged, concat, take
from protocols.data.messages import Experience
from workers.data.hf_folder import copy_auxiliary_files
from workers.losses.aggregation import Counts, counts_of, token_weights
from workers.losses.metrics import STEPS, accumulate
from workers.parallel.collection import collect_whole
from workers.parallel.decoder import unflat
from workers.parallel.model import Loss as LossOf
from workers.parallel.model import ParallelModel
from workers.parallel.plan import Head, Parameter, ShardPlan
from workers.settings import Loss, Optimizer
from workers.training.checkpoint import MOMENTS, Box, Counters, Saved, write_boxes
from workers.training.models import MicroBatch, Sequences
from workers.training.offload import Copy, relocated
from workers.training.optimizer_step import OptimizerSteps, StepRefused
from workers.training.trainable import mini_batches, named_rows

_KINDS = {
    "tokens": AutoModelForCausalLM,
    "value": AutoModelForTokenClassification,
    "score": AutoModelForSequenceClassification,
}
Objective = Callable[[Experience, Jagged], LossOf]  # the loss of a mini-batch whose tokens have these global weights


class ParallelTraining(OptimizerSteps):
    """One rank's part of a trained model."""

    def __init__(self, model: ParallelModel, path: str, learning_rate: float, settings: Optimizer) -> None:
        self.model = model
        super().__init__(model.optimized, path, learning_rate, settings)

    # --- learning

    def learn(
        self,
        what: str,
        experience: Experience,
        loss: Loss,
        seed: int,
        objective: Objective,
        beside: Callable[[int], Experience] | None = None,
    ) -> dict[str, float]:
        """One committed step of epochs x mini_batches optimizer steps: sums of loss, gradient norm and step count.

        The mini-batches are those that one process would draw of all replicas' rows; `beside` gives the untrained rows
        that follow those of an optimizer step, numbered from 0 over the whole run. Where a loss or gradient is not
        finite, or a rank raises, this rank's weights, moments and schedule are bitwise what they were; StepRefused
        names `what` and the rows.
        """
        taken: dict[str, float] = {}
        steps = loss.epochs * loss.mini_batches
        rows, replica = self._rows(experience), self.model.place.dp
        with self.update(steps):
            drawn = replica_mini_batches(experience, rows, replica, loss, seed + self.version)
            for number, batch in enumerate(drawn, self.version * steps):
                taking = f"{what} of {named_rows(batch)}"
                whole = concat([batch, beside(number)]) if beside is not None else batch
                weights = token_weights(whole.loss_mask, self._counts(whole.loss_mask), loss)
                step = self._step(taking, whole, loss.tokens_per_micro_batch, objective(whole, weights))
                accumulate(taken, step)
        return taken

    def over_replicas(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The measures of all replicas' rows, from those of each one's own: on every rank of the last stage."""
        total: dict[str, float] = {}
        for message in self.model.groups.data.gather_bytes(msgspec.msgpack.encode(measured)):
            accumulate(total, msgspec.msgpack.decode(message, type=dict[str, float]))
        return total

    def per_response(self, data: Sequences, budget: int, read: Callable[[Tensor, MicroBatch], Tensor]) -> Jagged | None:
        """What `read` makes of the outputs, a number a response token: float32 jagged like the responses.

        `budget` is in padded tokens a micro-batch. None on ranks of other stages than the last.
        """
        kept = self.model.forward(data, budget, lambda outputs, micro: read(outputs, micro).float().cpu())
        if not self.model.shard.is_last:
            return None
        return data.responses.with_values(torch.cat(kept).numpy() if kept else np.empty(0, np.float32))

    def relocate(self, copy: Copy) -> int:
        """Give weights and moments the storage that `copy` makes of each; their bytes."""
        moments = (state[moment] for state in self._optimizer.state.values() for moment in MOMENTS)
        return self.model.relocate(copy) + relocated(moments, copy)

    # --- keeping

    def save(self, folder: str) -> None:
        """Write weights, moments and counters into `folder`, which all ranks see.

        Returns when all of it is there.
        """
        model, place = self.model, self.model.place
        tensors = {"": self._in_first_replica(model.weight), **(self._moments() if self._updates else {})}
        if place.dp == 0:
            written = model.plan.written_by(place.pp, place.tp)
            boxes = {
                prefix + parameter.name: self._box(parameter, named[parameter.name])
                for prefix, named in tensors.items()
                for parameter in written
            }
            write_boxes(folder, model.groups.replica.index, boxes)
            model.groups.replica.wait(model.device)
        if model.rank == 0:
            Counters.now(self.version, self._updates).write(folder)
        model.sum_over_world(0.0)

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Restore what `save` wrote under any topology and backend, or a `TrainedModel` did.

        Raises ValueError, on every rank and changing nothing, where one can't read its part or it is another model's.
        """
        model = self.model
        counters, read = self._read(folder)
        self._restore(counters)
        for name, parameter in model.optimized.items():
            parameter.copy_(model.part(name, read[""][name]))
            if counters.updates:
                moments = {moment: model.part(name, read[f"{moment}."][name]) for moment in MOMENTS}
                self._restore_moments(parameter, moments, None)
        model.all_gather_updated()

    def collect(self) -> dict[str, Tensor]:
        """The whole tensors on rank 0, in host memory, in their checkpoint's names and order; elsewhere none."""
        model = self.model
        whole = collect_whole(
            model.plan, model.groups.replica, model.weight, model.dtype, model.device, first=model.place.dp == 0
        )
        if not whole:
            return {}
        order = skeleton(model.config, model.plan.decoder.head).state_dict()
        return {name: whole[name] for name in order if name in whole}  # a tied head is not

    def export(self, folder: str) -> None:
        """Write a transformers folder, tokenizer included, that transformers and vLLM load.

        Rank 0 writes; the others return when it has.
        """
        if whole := self.collect():
            module = skeleton(self.model.config, self.model.plan.decoder.head)
            module.load_state_dict(whole, strict=False, assign=True)
            module.tie_weights()
            module.save_pretrained(folder)
            copy_auxiliary_files(self._path, folder)
        self.model.sum_over_world(0.0)

    # --- one step

    def _step(self, what: str, batch: Experience, budget: int, loss: LossOf) -> dict[str, float]:
        total = self.model.backward(batch, budget, loss)
        if not math.isfinite(total):
            raise StepRefused(f"{what}: loss is {total}")
        norm = self.model.clip_gradient(self._clip)
        self._take_step(what, norm)
        self.model.all_gather_updated()
        return {"loss": total, "gradient_norm": norm, STEPS: 1.0}

    def _read(self, folder: str) -> tuple[Counters, dict[str, dict[str, Tensor]]]:
        """The counters, and this rank's tensors by prefix and name; where one rank has none, all raise."""
        model = self.model
        try:
            saved = Saved(folder)
            saved.refuse_other({parameter.name for parameter in ShardPlan(model.plan.decoder).parameters(0)})
            prefixes = ("", *(f"{moment}." for moment in MOMENTS)) if saved.counters.updates else ("",)
            read = {prefix: {name: self._shard(spec) for name, spec in model.specs.items()} for prefix in prefixes}
            for prefix, named in read.items():
                saved.read(
                    {
                        prefix + model.plan.source(spec).name: self._box(spec, named[name])
                        for name, spec in model.specs.items()
                    }
                )
        except ValueError:
            model.sum_over_world(1.0)
            raise
        if failed := int(model.sum_over_world(0.0)):
            raise ValueError(f"{folder}: {failed} of {model.topology.world_size} ranks could not read their part")
        return saved.counters, read

    def _shard(self, spec: Parameter) -> Tensor:
        """Room for this rank's shard of a parameter, laid out along its cut."""
        entries = torch.empty(self.model.plan.shard_elements(spec), dtype=self.model.dtype, device=self.model.device)
        return unflat(entries, spec, self.model.plan.shard_shape(spec))

    def _box(self, spec: Parameter, shard: Tensor) -> Box:
        return Box(shard, self.model.plan.shard_start(spec, self.model.place.tp), spec.shape)

    def _weights(self) -> Iterable[Tensor]:
        return self.model.parameters.values()

    def _release_gradient(self) -> None:
        self.model.release_gradient()

    def _rows(self, batch: Batch) -> list[int]:
        """Number of rows of each replica."""
        data = self.model.groups.data
        numbers = torch.zeros(data.size, 1, dtype=torch.int64, device=self.model.device)
        numbers[data.index] = len(batch)
        return data.gather_rows_(numbers).flatten().tolist()

    def _counts(self, mask: Jagged) -> Counts:
        """The counts of all replicas' rows."""
        own = counts_of(mask)
        both = torch.tensor([own.tokens, own.rows], dtype=torch.int64, device=self.model.device)
        return Counts(*self.model.groups.data.sum_(both).tolist())

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        state, model, found = self._optimizer.state, self.model, {}
        for moment in MOMENTS:
            parts = {name: state[parameter][moment] for name, parameter in model.optimized.items()}
            found[f"{moment}."] = self._in_first_replica(lambda name, parts=parts: model.whole(name, parts[name]))
        return found

    def _in_first_replica(self, shard: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The shard of each of this rank's parameters, by name, on the first replica; all replicas call."""
        found: dict[str, Tensor] = {}
        for name in self.model.specs:
            tensor = shard(name)
            if self.model.place.dp == 0:
                found[name] = tensor.cpu()
        return found


def replica_mini_batches(batch: B, rows: Sequence[int], replica: int, loss: Loss, seed: int) -> Iterator[B]:
    """A replica's part, perhaps empty, of each mini-batch of a step, as `mini_batches` draws them of all rows.

    `batch` are the rows of `replica`; `rows` says how many each has, and all of them stand in that order.
    """
    first = sum(rows[:replica])
    for drawn in mini_batches(Batch(sample_ids=np.arange(sum(rows))), loss, seed):
        own = drawn.sample_ids - first
        yield take(batch, own[(own >= 0) & (own < len(batch))])


def skeleton(config: PretrainedConfig, head: Head) -> PreTrainedModel:
    """transformers' own module for a model, without memory: its tensors' names and order, and a way to write them."""
    config = copy.deepcopy(config)
    if head != "tokens":
        config.num_labels = 1
    with torch.device("meta"):
        return _KINDS[head].from_config(config)
