"""Low-rank adapters: a layer's weight W becomes W + scaling B A, and only A and B train (Hu et al. 2021).

peft builds the layers and names the files; here stands what the rest of the project needs of them: the tensors that a
checkpoint holds, and the merged ones, which are the model's own by name and shape and so serve every engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.settings import Lora
from workers.training.models import canonical_tensors

A, B = ".lora_A.weight", ".lora_B.weight"  # behind a layer's name; [rank, inputs] and [outputs, rank]
_BASE = ".base_layer."
_PEFT_PREFIX = "base_model.model."  # of every name in peft's files
_ADAPTER = "default"


class Adapters:
    """The adapters of a model, which from now on trains nothing else.

    A is drawn from the seed and B is 0, so the model's answers are at first those of its folder. Both are float32,
    whatever the base is.
    """

    def __init__(self, model: PreTrainedModel, path: str, settings: Lora, seed: int) -> None:
        """`path` is the base's folder. Raises ValueError, with the names that there are, for targets of no layer."""
        from peft import LoraConfig, TaskType, inject_adapter_in_model

        self._model = model
        self._config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=settings.rank,
            lora_alpha=settings.scaling * settings.rank,  # type: ignore[arg-type]
            target_modules=_targets(model, settings, path),
            base_model_name_or_path=path,
            inference_mode=False,
        )
        self.scaling = settings.scaling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self._config, model, _ADAPTER)
        for _, layer in self._layers():
            # In bfloat16, as the base may be, most of an entry's updates would round to nothing.
            layer.lora_A.float()
            layer.lora_B.float()

    def tensors(self) -> dict[str, Tensor]:
        """A and B of every adapted layer, by layer name and A or B: what a checkpoint holds."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers():
            found[name + A] = layer.lora_A[_ADAPTER].weight.detach()
            found[name + B] = layer.lora_B[_ADAPTER].weight.detach()
        return found

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The canonical tensors of the model without adapters that answers as this one does; adapted ones are new."""
        base = {
            name.replace(_BASE, "."): tensor
            for name, tensor in canonical_tensors(self._model).items()
            if ".lora_" not in name
        }
        return merge(base, self.tensors(), self.scaling)

    @torch.no_grad()
    def forward_merged(self, merged: Mapping[str, Tensor], **inputs: Any) -> Any:
        """What the model without adapters gives for inputs: not quite this one, since `merged` rounds in bfloat16."""
        weights: dict[str, Tensor] = {}
        for name, layer in self._layers():
            weights[f"{name}{_BASE}weight"] = merged[f"{name}.weight"]
            weights[f"{name}.lora_B.{_ADAPTER}.weight"] = torch.zeros_like(layer.lora_B[_ADAPTER].weight)
        return torch.func.functional_call(self._model, weights, kwargs=inputs)

    def export(self, folder: str | Path) -> None:
        """Write the adapters as a folder that peft loads."""
        Path(folder).mkdir(exist_ok=True)
        named = {_PEFT_PREFIX + name: tensor.contiguous() for name, tensor in self.tensors().items()}
        save_file(named, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        self._config.save_pretrained(str(folder))

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import Linear

        return ((name, module) for name, module in self._model.named_modules() if isinstance(module, Linear))


def merge(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """base with W + scaling B A in the place of every adapted W; computed in float32, kept in W's dtype.

    Raises ValueError for an adapter whose layer the base does not have, or in another shape.
    """
    merged = dict(base)
    for name in (name.removesuffix(A) for name in adapters if name.endswith(A)):
        a, b = adapters[name + A], adapters[name + B]
        weight = merged.get(f"{name}.weight")
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            has = "no such layer" if weight is None else f"one of {list(weight.shape)}"
            raise ValueError(f"adapter of {name}, {list(b.shape)} x {list(a.shape)}: the base has {has}")
        merged[f"{name}.weight"] = (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)
    return merged


def _targets(model: PreTrainedModel, settings: Lora, path: str) -> list[str]:
    """The last names of the layers to adapt; without any, all linear ones but the output head."""
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for target in settings.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(f"lora.targets: {path} has no linear layer {target!r}; it has {', '.join(known)}")
    return settings.targets or known
