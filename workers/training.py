"""One trained model with its optimizer: the state that a checkpoint holds and that rolls back together."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from protocols.columns import B, Batch, take
from workers.lora import Adapters
from workers.models import canonical_tensors
from workers.settings import Loss, Optimizer

ADAPTERS = "adapters"  # their folder, in an exported one
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


class StepRefused(Exception):
    """An update with a loss or gradient that is not finite: weights and optimizer are as they were before it."""


class TrainedModel:
    """A model, its AdamW and its learning-rate schedule."""

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        learning_rate: float,
        settings: Optimizer,
        adapters: Adapters | None = None,
    ) -> None:
        """`adapters`: of the model, where nothing else of it trains."""
        if learning_rate <= 0:
            raise ValueError(f"model {path}: a trained model needs a learning_rate above 0, got {learning_rate}")
        self.model = model
        self.adapters = adapters
        self.version = 0  # committed steps these weights have seen
        self._path = path
        self._settings = settings
        self._learning_rate = learning_rate
        self._updates = 0  # optimizer steps taken, for the schedule
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [p for _, p in self._named],
            lr=learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            foreach=False,
        )

    @contextmanager
    def update(self, optimizer_steps: int) -> Iterator[None]:
        """The frame of one committed step: train mode inside, and a version more after it, or nothing at all.

        Where the body raises, weights, optimizer and schedule are bitwise what they were. Several optimizer steps
        need a copy to go back to, of weights and moments, that is held until the last one.
        """
        before = self._copy() if optimizer_steps > 1 else None
        self.model.train()
        try:
            yield
        except BaseException:
            if before is not None:
                self._go_back(*before)
            raise
        finally:
            self.model.eval()
            # Gradients that a refused micro-batch left behind would be added to the next step's.
            self._optimizer.zero_grad(set_to_none=True)
        self.version += 1

    def apply_gradients(self, what: str) -> float:
        """Clip, check and take one optimizer step; the gradient's global norm before clipping.

        Raises StepRefused, naming `what`, where the norm is not finite.
        """
        limit = self._settings.gradient_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in self._named], limit, foreach=False))
        if not math.isfinite(norm):
            raise StepRefused(f"{what}: gradient norm is {norm}; the optimizer step was not taken")
        self._updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * rate_share(self._updates, self._settings)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The canonical tensors; those that adapters change are merged, and new."""
        return self.adapters.merged() if self.adapters is not None else canonical_tensors(self.model)

    @property
    def _scaling(self) -> float | None:
        return self.adapters.scaling if self.adapters is not None else None

    def _state(self) -> Mapping[str, torch.Tensor]:
        """The tensors that training changes: a checkpoint's."""
        return self.adapters.tensors() if self.adapters is not None else canonical_tensors(self.model)

    def save(self, folder: str) -> None:
        """Write weights, optimizer state and counters into `folder`: safetensors and JSON.

        With adapters the weights are theirs alone; the base stands in its folder.
        """
        root = Path(folder)
        save_file({n: t.contiguous() for n, t in self._state().items()}, root / "model.safetensors")
        optimizer: dict[str, torch.Tensor] = {}
        for name, parameter in self._named:
            state = self._optimizer.state.get(parameter, {})
            optimizer |= {f"{part}.{name}": state[part].contiguous() for part in _OPTIMIZER_STATE if part in state}
        save_file(optimizer, root / "optimizer.safetensors")
        state = {
            "version": self.version,
            "updates": self._updates,
            "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
            "lora_scaling": self._scaling,
        }
        (root / "trainer.json").write_text(json.dumps(state))

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises ValueError, changing nothing, where it is another model's.

        That is, where names, shapes or the scaling of adapters differ.
        """
        root = Path(folder)
        own, saved = self._state(), load_file(root / "model.safetensors")
        _check_same(own, saved, folder)
        optimizer = load_file(root / "optimizer.safetensors")
        state = json.loads((root / "trainer.json").read_text())
        if (scaling := state.get("lora_scaling")) != self._scaling:
            raise ValueError(
                f"{folder}: its adapters count {scaling}, this model's {self._scaling}: the same adapters would be "
                "another policy; keep lora.alpha / lora.rank as it was"
            )
        self.version, self._updates = int(state["version"]), int(state["updates"])
        torch.set_rng_state(torch.from_numpy(np.frombuffer(bytes.fromhex(state["torch_rng"]), np.uint8).copy()))
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        self._optimizer.state.clear()  # a model that goes back to its start has no moments
        for name, parameter in self._named:
            if f"step.{name}" in optimizer:
                self._optimizer.state[parameter] = {part: optimizer[f"{part}.{name}"] for part in _OPTIMIZER_STATE}

    def export(self, folder: str) -> None:
        """Write a transformers folder, tokenizer included, that transformers and vLLM load.

        Adapters are merged into it, and stand in its folder adapters/ as peft loads them.
        """
        merged = None
        if self.adapters is not None:
            self.adapters.export(Path(folder) / ADAPTERS)
            merged = self.adapters.merged()
        self.model.save_pretrained(folder, state_dict=merged, safe_serialization=True)
        for name in _TOKENIZER_FILES:
            if (source := Path(self._path) / name).exists():
                shutil.copyfile(source, Path(folder) / name)

    def _copy(self) -> tuple[list[torch.Tensor], dict[str, object], int]:
        weights = [p.detach().clone() for _, p in self._named]
        return weights, copy.deepcopy(self._optimizer.state_dict()), self._updates

    @torch.no_grad()
    def _go_back(self, weights: list[torch.Tensor], optimizer: dict[str, object], updates: int) -> None:
        for (_, parameter), tensor in zip(self._named, weights, strict=True):
            parameter.copy_(tensor)
        self._optimizer.load_state_dict(optimizer)
        self._updates = updates


def _check_same(own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], where: str) -> None:
    if set(own) != set(saved):
        raise ValueError(f"{where}: tensors differ from the model's: {sorted(set(own) ^ set(saved))[:5]}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {list(saved[name].shape)}, the model's is {list(tensor.shape)}"
            )


def rate_share(update: int, settings: Optimizer) -> float:
    """Share of the learning rate that optimizer step `update`, counted from 1, takes: warm-up, then linear decay."""
    warm = min(1.0, update / settings.warmup_steps) if settings.warmup_steps else 1.0
    left = max(0.0, 1.0 - (update - 1) / settings.decay_steps) if settings.decay_steps else 1.0
    return warm * left


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
