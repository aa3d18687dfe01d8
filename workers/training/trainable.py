"""One trained model with its optimizer: the state that a checkpoint holds and that rolls back together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from protocols.data.columns import B, Batch, take
from workers.data.hf_folder import copy_auxiliary_files
from workers.settings import Loss, Optimizer
from workers.training.checkpoint import MOMENTS, STEP, Box, Counters, Saved
from workers.training.lora import Adapters
from workers.training.models import canonical_tensors
from workers.training.optimizer_step import OptimizerSteps

ADAPTERS = "adapters"  # their folder, in an exported one


class TrainedModel(OptimizerSteps):
    """A model in one process, its AdamW and its learning-rate schedule."""

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        learning_rate: float,
        settings: Optimizer,
        adapters: Adapters | None = None,
    ) -> None:
        """`adapters`: of the model, where nothing else of it trains."""
        self.model = model
        self.adapters = adapters
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(self._named, path, learning_rate, settings)

    @contextmanager
    def update(self, optimizer_steps: int) -> Iterator[None]:
        """See OptimizerSteps.update; the model is in train mode inside."""
        self.model.train()
        try:
            with super().update(optimizer_steps):
                yield
        finally:
            self.model.eval()

    def apply_gradients(self, what: str) -> float:
        """Clip, check and take one optimizer step; the gradient's global norm before clipping.

        Raises StepRefused, naming `what`, where the norm is not finite.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self._weights(), self._clip, foreach=False))
        self._take_step(what, norm)
        self._release_gradient()
        return norm

    def tensors(self) -> Mapping[str, Tensor]:
        """The canonical tensors; those that adapters change are merged, and new."""
        return self.adapters.merged() if self.adapters is not None else canonical_tensors(self.model)

    def save(self, folder: str) -> None:
        """Write weights, optimizer state and counters into `folder`: safetensors and JSON.

        With adapters the weights are theirs alone; the base stands in its folder.
        """
        root = Path(folder)
        save_file({n: t.contiguous() for n, t in self._state().items()}, root / "model.safetensors")
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            state = self._optimizer.state.get(parameter, {})
            optimizer |= {f"{part}.{name}": state[part].contiguous() for part in (STEP, *MOMENTS) if part in state}
        save_file(optimizer, root / "optimizer.safetensors")
        Counters.now(self.version, self._updates, self._scaling).write(root)

    def load(self, folder: str) -> None:
        """Restore what `save` wrote, or the ranks of a `ParallelTraining` did.

        Raises ValueError, changing nothing, where it is another model's: where names, shapes or the scaling of
        adapters differ.
        """
        saved, own = Saved(folder), self._state()
        saved.refuse_other(own)
        if (scaling := saved.counters.lora_scaling) != self._scaling:
            raise ValueError(
                f"{folder}: its adapters count {scaling}, this model's {self._scaling}: the same adapters would be "
                "another policy; keep lora.alpha / lora.rank as it was"
            )
        read = {name: torch.empty_like(tensor) for name, tensor in own.items()}
        for name, parameter in self._named.items():
            read |= {
                f"{part}.{name}": torch.empty_like(parameter) if part in MOMENTS else torch.empty(())
                for part in (STEP, *MOMENTS)
                if f"{part}.{name}" in saved
            }
        saved.read({name: Box.all_of(tensor.detach()) for name, tensor in read.items()})
        for name, tensor in own.items():
            tensor.copy_(read[name])
        self._restore(saved.counters)
        for name, parameter in self._named.items():
            moments = {part: read[f"{part}.{name}"] for part in MOMENTS if f"{part}.{name}" in read}
            if moments:
                self._restore_moments(parameter, moments, read.get(f"{STEP}.{name}"))

    def export(self, folder: str) -> None:
        """Write a transformers folder, tokenizer included, that transformers and vLLM load.

        Adapters are merged into it, and stand in its folder adapters/ as peft loads them.
        """
        merged = None
        if self.adapters is not None:
            self.adapters.export(Path(folder) / ADAPTERS)
            merged = self.adapters.merged()
        self.model.save_pretrained(folder, state_dict=merged, safe_serialization=True)
        copy_auxiliary_files(self._path, folder)

    @property
    def _scaling(self) -> float | None:
        return self.adapters.scaling if self.adapters is not None else None

    def _state(self) -> Mapping[str, Tensor]:
        """The tensors that training changes: a checkpoint's."""
        return self.adapters.tensors() if self.adapters is not None else canonical_tensors(self.model)

    def _weights(self) -> Iterable[Tensor]:
        return self._named.values()

    def _release_gradient(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


def mini_batches(batch: B, settings: Loss, seed: int) -> Iterator[B]:
    """The mini-batches of all epochs of a step: one is the batch in its order, several are drawn by a permutation."""
    for epoch in range(settings.epochs):
        if settings.mini_batches == 1:
            yield batch
            continue
        order = np.random.default_rng([seed, epoch]).permutation(len(batch))
        for rows in np.array_split(order, settings.mini_batches):
            if len(rows):
                yield take(batch, rows)


def named_rows(batch: Batch) -> str:
    """How an error names a batch: its first ids and their number."""
    ids = batch.sample_ids
    return f"batch of {len(ids)} samples ({', '.join(map(str, ids[:4].tolist()))}{', ...' if len(ids) > 4 else ''})"
