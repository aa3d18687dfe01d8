"""A trained model with its optimizer: the state that a checkpoint holds and that rolls back together.

It trains whatever a `ParallelModel` holds: a whole transformers model on one device, with or without adapters, or this
rank's part of one that several ranks share. All ranks call each method together, each with its own replica's rows. What
is refused is refused on all of them, since they see the same loss and the same norm.

Each rank's AdamW has the moments of what it steps: its shard, or its replica's part of that. The first replica writes
a checkpoint in shards, which any topology and backend reads; rank 0 collects what is published or exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel

from protocols.data.columns import Batch, concat
from protocols.data.jagged import Jagged
from protocols.data.messages import Experience
from workers.data.hf_folder import copy_auxiliary_files
from workers.data.token_rows import Sequences
from workers.losses import metrics
from workers.losses.aggregation import Counts, counts_of, token_weights
from workers.parallel.collection import collect_whole
from workers.parallel.decoder import unflat
from workers.parallel.merged import merged
from workers.parallel.model import MicroLoss
from workers.parallel.plan import Parameter
from workers.settings import Loss
from workers.training.checkpoint import MOMENTS, Box, Counters, Saved, write_boxes
from workers.training.checkpoint_names import CheckpointNames
from workers.training.lora import checkpoint_name, is_adapter
from workers.training.mini_batches import named_rows, replica_mini_batches
from workers.training.model_classes import skeleton
from workers.training.offload import Copy, relocated
from workers.training.optimizer_step import OptimizerSteps, StepRefused

ADAPTERS = "adapters"  # their folder, inside an exported one

BatchLoss = Callable[[Experience, Jagged], MicroLoss]  # the loss of a mini-batch whose tokens have these global weights


class TrainableModel(OptimizerSteps):
    """One rank's part of a trained model."""

    # --- learning

    def learn(
        self,
        what: str,
        experience: Experience,
        loss: Loss,
        seed: int,
        batch_loss: BatchLoss,
        extra_rows: Callable[[int], Experience] | None = None,
    ) -> dict[str, float]:
        """One committed step of epochs x mini_batches optimizer steps: sums of loss, gradient norm and step count.

        The mini-batches are cut from all replicas' rows; `extra_rows` gives further rows for an optimizer step, which
        it is given as a number from 0 over the whole run. Where a loss or gradient is not finite, or a rank raises,
        this rank's weights, moments and schedule are bitwise what they were; StepRefused names `what` and the rows.
        """
        taken: dict[str, float] = {}
        steps = loss.epochs * loss.mini_batches
        rows, replica = self._rows(experience), self.model.place.dp
        with self.update(steps):
            cut = replica_mini_batches(experience, rows, replica, loss, seed + self.version)
            for number, batch in enumerate(cut, self.version * steps):
                named = f"{what} of {named_rows(batch)}"
                whole = concat([batch, extra_rows(number)]) if extra_rows is not None else batch
                weights = token_weights(whole.loss_mask, self._counts(whole.loss_mask), loss)
                step = self.step(named, whole, loss.tokens_per_micro_batch, batch_loss(whole, weights))
                metrics.accumulate(taken, step)
        return taken

    def step(self, what: str, batch: Sequences, budget: int, loss: MicroLoss, together: int = 1) -> dict[str, float]:
        """One optimizer step inside `update`: loss, the gradient's norm before clipping, learning rate, a count of 1.

        The loss sees `together` successive rows at once, see `micro_batches`. Raises StepRefused, naming `what`, where
        loss or norm is not finite, and StepAbandoned after `abandon`.
        """
        self._end_if_abandoned(what)
        total = self.model.backward(batch, budget, loss, together)
        if not math.isfinite(total):
            raise StepRefused(f"{what}: loss is {total}")
        norm = self.model.clip_gradient(self._clip)
        self._end_if_abandoned(what)
        self._take_step(what, norm)
        self.model.all_gather_updated()
        return {"loss": total, "gradient_norm": norm, "learning_rate": self.last_rate, metrics.STEPS: 1.0}

    def over_replicas(self, measured: Mapping[str, float]) -> dict[str, float]:
        """The metrics of all replicas' rows, from those of each one's own: on every rank of the last stage."""
        total: dict[str, float] = {}
        for message in self.model.groups.data.gather_bytes(msgspec.msgpack.encode(measured)):
            metrics.accumulate(total, msgspec.msgpack.decode(message, type=dict[str, float]))
        return total

    def relocate(self, copy: Copy) -> int:
        """Give weights and moments the storage that `copy` makes of each; their bytes."""
        moments = (state[moment] for state in self._optimizer.state.values() for moment in MOMENTS)
        return self.model.relocate(copy) + relocated(moments, copy)

    # --- keeping

    def save(self, folder: str) -> None:
        """Write weights, moments and counters into `folder`, which all ranks see; with adapters theirs alone.

        Weights are written as they are stepped: a model in bfloat16 has float32 masters and moments there. Returns when
        all of it is there.
        """
        model, place = self.model, self.model.place
        tensors = {"": self._in_first_replica(model.stepped_weight), **(self._moments() if self._updates else {})}
        if place.dp == 0:
            boxes = {
                prefix + model.plan.source(spec).name: self._box(spec, named[spec.name])
                for prefix, named in tensors.items()
                for spec in model.plan.written_by(place.pp, place.tp)
            }
            write_boxes(folder, model.groups.replica.index, boxes)
            model.groups.replica.wait(model.device)
        if model.rank == 0:
            Counters.now(self.version, self._updates, self._scaling).write(folder)
        model.sum_over_world(0.0)

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Restore what `save` wrote under any topology and backend, in either dtype of the model.

        Weights in bfloat16, as earlier versions wrote them, become the values of the masters.
        Raises ValueError, on every rank and changing nothing, where one can't read its part or it is another model's:
        where names, shapes or the scaling of adapters differ.
        """
        model = self.model
        counters, read = self._read(folder)
        self._restore(counters)
        for name, parameter in model.optimized.items():
            parameter.copy_(model.local_part(name, read[""][name]))
            if counters.updates:
                moments = {moment: model.local_part(name, read[f"{moment}."][name]) for moment in MOMENTS}
                self._restore_moments(parameter, moments)
        model.all_gather_updated()

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """The model's own tensors on rank 0, in host memory, under their checkpoint's names; elsewhere none.

        Adapters are left out: inside `merged` the tensors include them. See `collect_whole` for which are copies.
        """
        return CheckpointNames(self._skeleton).to_checkpoint(self._collect_in_memory())

    @torch.no_grad()
    def collect_adapters(self) -> dict[str, Tensor]:
        """A and B of every adapted weight, by their public names, on rank 0; elsewhere none."""
        found, adapters = self._collect(is_adapter), self.model.adapters
        return adapters.published(found) if adapters is not None else {}

    def export(self, folder: str) -> None:
        """Write a transformers folder, tokenizer included, that transformers and vLLM load.

        Adapters are merged into it, and stand in its folder adapters/ as peft loads them. Rank 0 writes; the others
        return when it has.
        """
        model = self.model
        if (adapters := model.adapters) is not None and (tensors := self.collect_adapters()):
            adapters.export(Path(folder) / ADAPTERS, tensors)
        with merged(model):
            if whole := self._collect_in_memory():
                module = skeleton(model.config, model.plan.head)
                module.load_state_dict(whole, strict=False, assign=True)
                module.tie_weights()
                module.save_pretrained(folder)
                copy_auxiliary_files(self._path, folder)
        model.sum_over_world(0.0)

    # --- inside

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return skeleton(self.model.config, self.model.plan.head)

    def _collect_in_memory(self) -> dict[str, Tensor]:
        """`collect`, under transformers' names and in its order."""
        found = self._collect(lambda name: not is_adapter(name))
        if self.model.rank != 0:
            return {}
        whole = {checkpoint_name(name): tensor for name, tensor in found.items()} | self.model.constants()
        return {name: whole[name] for name in self._skeleton.state_dict() if name in whole}  # a tied head is not

    @property
    def _scaling(self) -> float | None:
        return self.model.adapters.scaling if self.model.adapters is not None else None

    def _collect(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        model = self.model
        return collect_whole(
            model.plan,
            model.groups.replica,
            model.weight,
            model.dtype,
            model.device,
            first=model.place.dp == 0,
            wanted=wanted,
        )

    def _read(self, folder: str) -> tuple[Counters, dict[str, dict[str, Tensor]]]:
        """The counters, and this rank's tensors by prefix and name; where one rank has none, all raise."""
        model = self.model
        specs = {name: model.specs[name] for name in model.optimized}
        try:
            saved = Saved(folder)
            whole = model.plan.undivided()
            saved.refuse_other({whole.source(spec).name for spec in whole.parameters(0) if not spec.frozen})
            self._refuse_other_scaling(folder, saved.counters)
            prefixes = ("", *(f"{moment}." for moment in MOMENTS)) if saved.counters.updates else ("",)
            read = {prefix: {name: self._shard(spec) for name, spec in specs.items()} for prefix in prefixes}
            for prefix, named in read.items():
                saved.read(
                    {prefix + model.plan.source(spec).name: self._box(spec, named[n]) for n, spec in specs.items()}
                )
        except ValueError:
            model.sum_over_world(1.0)
            raise
        if failed := int(model.sum_over_world(0.0)):
            raise ValueError(f"{folder}: {failed} of {model.topology.world_size} ranks could not read their part")
        return saved.counters, read

    def _refuse_other_scaling(self, folder: str, counters: Counters) -> None:
        if counters.lora_scaling != self._scaling:
            raise ValueError(
                f"{folder}: adapter scaling is {counters.lora_scaling} in the checkpoint, {self._scaling} in "
                "this model: the same adapters would be another policy; keep lora.alpha / lora.rank as it was"
            )

    def _shard(self, spec: Parameter) -> Tensor:
        """Room for this rank's shard of a parameter, laid out along its cut."""
        like = self.model.optimized[spec.name]
        entries = torch.empty(self.model.plan.shard_elements(spec), dtype=like.dtype, device=self.model.device)
        return unflat(entries, spec, self.model.plan.shard_shape(spec))

    def _box(self, spec: Parameter, shard: Tensor) -> Box:
        return Box(shard, self.model.plan.shard_start(spec, self.model.place.tp), spec.shape)

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
            found[f"{moment}."] = self._in_first_replica(lambda name, parts=parts: model.unshard(name, parts[name]))
        return found

    def _in_first_replica(self, shard: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The shard of each of this rank's trained parameters, by name, on the first replica; all replicas call."""
        found: dict[str, Tensor] = {}
        for name in self.model.optimized:
            tensor = shard(name)
            if self.model.place.dp == 0:
                found[name] = tensor.cpu()
        return found
