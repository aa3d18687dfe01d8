"""Low-rank adapters: a layer's weight W becomes W + scaling B A, and only A and B train (Hu et al. 2021).

The weights of a mixture's experts, which transformers fuses into one tensor [experts, ...], have an A and a B of this
rank for each expert, in one matrix each.

peft builds the layers and names the files. This module adds what the rest of the project needs: which parameters
belong together, their names in a checkpoint, and the merged weights, which have the names and shapes of the base and
so serve every engine.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workers.settings import Lora
from workers.training.model_classes import number_head, skeleton

_log = logging.getLogger("asyncflow.models")

# Behind a layer's name: [rank, inputs] and [outputs, rank]. Behind that of experts' weights:
# [experts x rank, inputs] and [outputs, rank x experts], as peft has them.
A, B = ".lora_A.weight", ".lora_B.weight"
_BASE = ".base_layer"
_PEFT_PREFIX = "base_model.model."  # of every name in peft's files
_ADAPTER = "default"


class AdaptedWeight(NamedTuple):
    """A weight with its adapter: names among the model's parameters, but for `name`."""

    name: str  # of the adapter in a publication: its layer's, or that of the experts' weights
    weight: str
    a: str
    b: str
    transposed: bool  # W is [inputs, outputs], or [experts, inputs, outputs]


class Adapters:
    """The adapters of a model, which from now on trains nothing else.

    A is sampled from the seed and B is 0, so the model's answers are at first those of its folder. Both are float32,
    whatever the base is.
    """

    def __init__(self, model: PreTrainedModel, path: str, settings: Lora, seed: int) -> None:
        """`path` is the base's folder. Raises ValueError, with the names that there are, for targets of no layer."""
        from peft import LoraConfig, TaskType, inject_adapter_in_model
        from peft.tuners.lora import Linear, ParamWrapper

        transposed = transposed_weights(model)
        linear, experts = _linear(model), list(_experts(model))
        _refuse_unknown([*linear, *experts], settings, path)
        targets = settings.targets or sorted({name.rpartition(".")[2] for name in (*linear, *experts)})
        self._config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=settings.rank,
            lora_alpha=settings.scaling * settings.rank,  # type: ignore[arg-type]
            target_modules=[target for target in targets if _named(target, linear)],
            target_parameters=[target for target in targets if _named(target, experts)] or None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            base_model_name_or_path=path,
            inference_mode=False,
        )
        self.scaling = settings.scaling
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of peft, about what it leaves out: that is said below
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(self._config, model, _ADAPTER)
            except ValueError as error:
                raise ValueError(f"lora: peft can't adapt {path}: {error}") from error
        self.weights: list[AdaptedWeight] = []
        for name, module in model.named_modules():
            if not isinstance(module, Linear | ParamWrapper):
                continue
            # In bfloat16, as the base may be, most of an entry's updates would round to nothing.
            module.lora_A.float()
            module.lora_B.float()
            weight = f"{name}{_BASE}.weight"
            if isinstance(module, ParamWrapper):  # one stands around the other for each weight of the experts
                depth = sum(isinstance(inner, ParamWrapper) for inner in module.modules())
                weight = f"{name}{_BASE * depth}.{module.parameter_name}"
            own = checkpoint_name(weight) if isinstance(module, ParamWrapper) else name
            a, b = (f"{name}.lora_{which}.{_ADAPTER}.weight" for which in "AB")
            self.weights.append(AdaptedWeight(own, weight, a, b, own in transposed))
        adapted = [own.name for own in self.weights]
        left_out = {name for target in targets for name in _named(target, [*linear, *experts])} - {*adapted}
        _refuse_left_out(sorted(left_out), adapted, settings, path)

    def published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A and B of all adapted weights, given by their names among the model's parameters, by their public names."""
        names = self._public_names()
        return {names[name]: tensor for name, tensor in tensors.items()}

    def export(self, folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
        """Write A and B of all adapted weights, by their public names, as a folder that peft loads."""
        Path(folder).mkdir(exist_ok=True)
        files = {public: checkpoint_name(name) for name, public in self._public_names().items()}
        named = {_PEFT_PREFIX + files[name]: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        self._config.save_pretrained(str(folder))

    def _public_names(self) -> dict[str, str]:
        return {name: own.name + end for own in self.weights for name, end in ((own.a, A), (own.b, B))}


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return ".lora_" in name


def checkpoint_name(name: str) -> str:
    """A parameter's name without what peft adds: an adapter's A or B, or the name that the model's folder has."""
    return name.replace(f".{_ADAPTER}.", ".") if is_adapter(name) else re.sub(rf"{re.escape(_BASE)}(?=\.)", "", name)


def transposed_weights(model: nn.Module) -> set[str]:
    """What has its W as [inputs, outputs]: transformers' Conv1D, which GPT-2 is made of, and experts of some families.

    They are called as their adapters are when these are published.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    experts = _experts(model)
    return layers | {name for name, module in experts.items() if getattr(module, "is_transposed", False)}


def merge(
    base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scaling: float, transposed: Container[str] = ()
) -> dict[str, Tensor]:
    """base with W + scaling B A in the place of every adapted W; computed in float32, kept in W's dtype.

    `transposed`: see `transposed_weights`. Raises ValueError for an adapter whose weight the base does not have, or in
    another shape.
    """
    merged = dict(base)
    for name in (name.removesuffix(A) for name in adapters if name.endswith(A)):
        a, b = adapters[name + A], adapters[name + B]
        own = name if name in merged else f"{name}.weight"
        weight = merged.get(own)
        change = product(a, b, weight.shape, transposed=name in transposed) if weight is not None else None
        if weight is None or change is None:
            has = "no such layer" if weight is None else f"one of {list(weight.shape)}"
            raise ValueError(f"adapter of {name}, {list(b.shape)} x {list(a.shape)}: the base has {has}")
        merged[own] = merged_weight(weight, change, scaling)
    return merged


def product(a: Tensor, b: Tensor, shape: Sequence[int], *, transposed: bool) -> Tensor | None:
    """B A in float32 in the shape of its W: [outputs, inputs] or transposed, for each expert where there are several.

    None if it has another shape.
    """
    experts, a, b = (shape[0] if len(shape) == 3 else 1), a.float(), b.float()
    if len(a) % experts or len(a) != b.shape[1]:
        return None
    if len(shape) == 3:
        of_each = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts)
        change = torch.einsum("eri,ore->eio" if transposed else "eri,ore->eoi", *of_each)
    else:
        change = (b @ a).T if transposed else b @ a
    return change if change.shape == tuple(shape) else None


def merged_weight(weight: Tensor, product: Tensor, scaling: float) -> Tensor:
    """W + scaling B A: computed in float32, kept in W's dtype."""
    return (weight.float() + scaling * product).to(weight.dtype)


def unadaptable(path: str, settings: Lora) -> str:
    """Why the policy of a folder can't have these adapters; "" if it can. Reads its config alone, no weights."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    try:
        Adapters(skeleton(config, "tokens"), path, settings, seed=0)
    except ValueError as error:
        return str(error)
    return ""


def _refuse_unknown(names: Sequence[str], settings: Lora, path: str) -> None:
    known = sorted({name.rpartition(".")[2] for name in names})
    if not known:
        raise ValueError(f"lora: {path} has no linear layer to adapt")
    for target in settings.targets:
        if not _named(target, names):
            raise ValueError(f"lora.targets: {path} has no linear layer {target!r}; it has {', '.join(known)}")


def _refuse_left_out(left_out: Sequence[str], adapted: Sequence[str], settings: Lora, path: str) -> None:
    """peft takes some names of a mixture of experts for those of its experts, and leaves layers of that name out."""
    for target in settings.targets:
        if not _named(target, adapted):
            raise ValueError(f"lora.targets: peft can't adapt {target!r} of {path}, a mixture of experts: leave it out")
    if left_out:
        _log.warning("lora: %s: peft adapts all but %s", path, ", ".join(left_out))


def _named(target: str, names: Sequence[str]) -> list[str]:
    """The names that end with a target's, part by part."""
    return [name for name in names if f".{name}".endswith(f".{target}")]


def _linear(model: PreTrainedModel) -> list[str]:
    """The linear layers but the output head, by name."""
    head = model.get_output_embeddings() or number_head(model)
    # A router of experts may be a linear layer of a kind of its own, which answers more than a product.
    return [name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head]


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    """The weights of experts that are fused into one tensor, by name, and the module of each."""
    return {
        f"{name}.{leaf}": module
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")  # a convolution's weight has three dimensions as well
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
