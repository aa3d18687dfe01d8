"""Low-rank adapters: a layer's weight W becomes W + scaling B A, and only A and B train (Hu et al. 2021).

peft builds the layers and names the files. This module adds what the rest of the project needs: which parameters
belong together, their names in a checkpoint, and the merged weights, which have the names and shapes of the base and
so serve every engine.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workers.settings import Lora
from workers.training.model_classes import number_head

A, B = ".lora_A.weight", ".lora_B.weight"  # behind a layer's name; [rank, inputs] and [outputs, rank]
_BASE = ".base_layer."
_PEFT_PREFIX = "base_model.model."  # of every name in peft's files
_ADAPTER = "default"


class Adapters:
    """The adapters of a model, which from now on trains nothing else.

    A is sampled from the seed and B is 0, so the model's answers are at first those of its folder. Both are float32,
    whatever the base is.
    """

    def __init__(self, model: PreTrainedModel, path: str, settings: Lora, seed: int) -> None:
        """`path` is the base's folder. Raises ValueError, with the names that there are, for targets of no layer."""
        from peft import LoraConfig, TaskType, inject_adapter_in_model
        from peft.tuners.lora import Linear

        self._config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=settings.rank,
            lora_alpha=settings.scaling * settings.rank,  # type: ignore[arg-type]
            target_modules=_targets(model, settings, path),
            fan_in_fan_out=bool(transposed_layers(model)),
            base_model_name_or_path=path,
            inference_mode=False,
        )
        self.scaling = settings.scaling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self._config, model, _ADAPTER)
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
        for _, layer in layers:
            # In bfloat16, as the base may be, most of an entry's updates would round to nothing.
            layer.lora_A.float()
            layer.lora_B.float()
        self.layers = {name: layer.fan_in_fan_out for name, layer in layers}  # name -> whether W is transposed

    def export(self, folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
        """Write A and B of every layer, by their names in a checkpoint, as a folder that peft loads."""
        Path(folder).mkdir(exist_ok=True)
        named = {_PEFT_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        self._config.save_pretrained(str(folder))


def adapter_parameters(layer: str) -> tuple[str, str, str]:
    """Names of a layer's own weight, of A and of B among the model's parameters."""
    return f"{layer}{_BASE}weight", f"{layer}.lora_A.{_ADAPTER}.weight", f"{layer}.lora_B.{_ADAPTER}.weight"


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name


def checkpoint_name(name: str) -> str:
    """A parameter's name without what peft adds: an adapter's A or B, or the name that the model's folder has."""
    return name.replace(f".{_ADAPTER}.", ".") if is_adapter(name) else name.replace(_BASE, ".")


def transposed_layers(model: nn.Module) -> set[str]:
    """The linear layers whose W is [inputs, outputs]: transformers' Conv1D, which GPT-2 is made of."""
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def merge(
    base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scaling: float, transposed: Container[str] = ()
) -> dict[str, Tensor]:
    """base with W + scaling B A in the place of every adapted W; computed in float32, kept in W's dtype.

    `transposed`: see `transposed_layers`. Raises ValueError for an adapter whose layer the base does not have, or in
    another shape.
    """
    merged = dict(base)
    for name in (name.removesuffix(A) for name in adapters if name.endswith(A)):
        a, b = adapters[name + A], adapters[name + B]
        weight, change = merged.get(f"{name}.weight"), product(a, b, transposed=name in transposed)
        if weight is None or weight.shape != change.shape:
            has = "no such layer" if weight is None else f"one of {list(weight.shape)}"
            raise ValueError(f"adapter of {name}, {list(b.shape)} x {list(a.shape)}: the base has {has}")
        merged[f"{name}.weight"] = merged_weight(weight, change, scaling)
    return merged


def product(a: Tensor, b: Tensor, *, transposed: bool) -> Tensor:
    """B A in float32, in the layout of its layer's W: [outputs, inputs], or transposed."""
    change = b.float() @ a.float()
    return change.T if transposed else change


def merged_weight(weight: Tensor, product: Tensor, scaling: float) -> Tensor:
    """W + scaling B A: computed in float32, kept in W's dtype."""
    return (weight.float() + scaling * product).to(weight.dtype)


def _targets(model: PreTrainedModel, settings: Lora, path: str) -> list[str]:
    """The last names of the layers to adapt; without any, all linear ones but the output head."""
    head = model.get_output_embeddings() or number_head(model)
    # A router of experts may be a linear layer of a kind of its own, which answers more than a product.
    linear = [name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head]
    known = sorted({name.rpartition(".")[2] for name in linear})
    if not known:
        raise ValueError(f"lora: {path} has no linear layer to adapt")
    for target in settings.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(f"lora.targets: {path} has no linear layer {target!r}; it has {', '.join(known)}")
    return settings.targets or known
