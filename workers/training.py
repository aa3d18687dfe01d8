"""One trained model with its optimizer: the state that a checkpoint holds and that rolls back together."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from protocols.columns import B, Batch, take
from workers.models import canonical_tensors
from workers.settings import Loss, Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")
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

    def __init__(self, model: PreTrainedModel, path: str, learning_rate: float, settings: Optimizer) -> None:
        if learning_rate <= 0:
            raise ValueError(f"model {path}: a trained model needs a learning_rate above 0, got {learning_rate}")
        self.model = model
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

    def apply_gradients(self, what: str) -> float:
        """Clip, check and take one optimizer step; the gradient's global norm before clipping.

        Raises StepRefused, naming `what`, where the norm is not finite.
        """
        limit = self._settings.gradient_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in self._named], limit, foreach=False))
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise StepRefused(f"{what}: gradient norm is {norm}; the optimizer step was not taken")
        self._updates += 1
        warm = min(1.0, self._updates / self._settings.warmup_steps) if self._settings.warmup_steps else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * warm
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: str) -> None:
        """Write weights, moments and counters into `folder`: safetensors and JSON."""
        root = Path(folder)
        save_file({n: t.contiguous() for n, t in canonical_tensors(self.model).items()}, root / "model.safetensors")
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in self._named:
            state = self._optimizer.state.get(parameter, {})
            moments |= {f"{m}.{name}": state[m].contiguous() for m in _MOMENTS if m in state}
        save_file(moments, root / "optimizer.safetensors")
        state = {
            "version": self.version,
            "updates": self._updates,
            "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
        }
        (root / "trainer.json").write_text(json.dumps(state))

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises ValueError where names or shapes are another model's."""
        root = Path(folder)
        _copy_into(canonical_tensors(self.model), load_file(root / "model.safetensors"), folder)
        state = json.loads((root / "trainer.json").read_text())
        self.version, self._updates = int(state["version"]), int(state["updates"])
        torch.set_rng_state(torch.from_numpy(np.frombuffer(bytes.fromhex(state["torch_rng"]), np.uint8).copy()))
        moments = load_file(root / "optimizer.safetensors")
        for name, parameter in self._named:
            if f"exp_avg.{name}" in moments:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self._updates)),
                    **{m: moments[f"{m}.{name}"] for m in _MOMENTS},
                }

    def export(self, folder: str) -> None:
        """Write a transformers folder, tokenizer included, that transformers and vLLM load."""
        self.model.save_pretrained(folder, safe_serialization=True)
        for name in _TOKENIZER_FILES:
            if (source := Path(self._path) / name).exists():
                shutil.copyfile(source, Path(folder) / name)


def _copy_into(own: Any, saved: dict[str, torch.Tensor], where: str) -> None:
    if set(own) != set(saved):
        raise ValueError(f"{where}: tensors differ from the model's: {sorted(set(own) ^ set(saved))[:5]}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {list(saved[name].shape)}, the model's is {list(tensor.shape)}"
            )
        tensor.copy_(saved[name])


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
