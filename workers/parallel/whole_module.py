"""A whole transformers model as the only shard of a replica: any family that transformers loads, p = t = 1.

It has the interface of `DecoderShard` and `ShardPlan`, which cut the families that have a sharding plan. So one device,
ZeRO and FSDP train any model, with or without adapters; no parameter has a dimension to cut, and FSDP divides rows.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from workers.parallel.plan import Head, Parameter
from workers.parallel.sharding import Sharding
from workers.settings import Dtype, Model
from workers.training.attention import reads_mask
from workers.training.lora import Adapters, checkpoint_name
from workers.training.model_classes import number_head
from workers.training.models import load_causal, load_critic, load_reward
from workers.training.outputs import Outputs, ReadOutputs, chunk_of
from workers.training.token_head import TokenHead

_log = logging.getLogger("asyncflow.models")

_LOADERS = {"tokens": load_causal, "value": load_critic}


class WholePlan(msgspec.Struct, frozen=True):
    """The parameters of a model that is not cut. Its interface is that of ShardPlan."""

    head: Head
    specs: tuple[Parameter, ...]

    pp = tp = 1
    tied_across_stages = False

    def undivided(self) -> WholePlan:
        """The plan itself."""
        return self

    def parameters(self, stage: int) -> tuple[Parameter, ...]:
        """All parameters, each storage once."""
        return self.specs

    def stage_of(self, parameter: Parameter) -> int:
        """The only stage."""
        return 0

    def source(self, parameter: Parameter) -> Parameter:
        """Under which name a checkpoint has a parameter."""
        return msgspec.structs.replace(parameter, name=checkpoint_name(parameter.name))

    def written_by(self, stage: int, tensor_index: int) -> list[Parameter]:
        """What goes into a checkpoint: the parameters that are trained."""
        return [spec for spec in self.specs if not spec.frozen]

    def shard_shape(self, parameter: Parameter) -> tuple[int, ...]:
        """The parameter's own shape."""
        return parameter.shape

    def shard_start(self, parameter: Parameter, tensor_index: int) -> tuple[int, ...]:
        """The origin."""
        return (0,) * len(parameter.shape)

    def shard_elements(self, parameter: Parameter) -> int:
        """Number of entries."""
        return parameter.elements


class WholeModule(nn.Module):
    """A model from a transformers folder with its head: logits, or a value or a score per position.

    The model stays in eval mode: dropout is never applied, as a row must not depend on which rank computes it. Only
    supervised fine-tuning on one device may apply it, see `workers.finetune.dropout`.
    Adapters, where the settings have a rank of 1 or more for them, are then all that trains. Every rank reads the whole
    folder into host memory first; of a model that trains in bfloat16 also in float32, for its master weights.
    """

    is_first = is_last = True

    def __init__(self, model: Model, sharding: Sharding, head: Head, seed: int | None, *, trains: bool = True) -> None:
        """`seed`: see `trained_model`. Raises ValueError where the folder lacks tensors."""
        super().__init__()
        path = model.path
        self.model = _loaded(model, model.dtype, head, seed)
        self.config = self.model.config
        self.reads_mask = reads_mask(self.config)
        self._device = torch.device(sharding.device)
        self.adapters = Adapters(self.model, path, model.lora, seed or 0) if model.lora.rank else None
        if self.adapters is not None and head == "score":
            number_head(self.model).requires_grad_(True)  # it may be new, and adapters alone could not scale its scores
        self._names: defaultdict[str, list[str]] = defaultdict(list)  # all names of a tied parameter, by its first
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self._names[first.setdefault(id(parameter), name)].append(name)
        self._token_head = self._tried_head() if head == "tokens" else None
        self._chunk = chunk_of(model.head_chunk, self.config.get_text_config().vocab_size)
        own = self.by_name()
        self.plan = WholePlan(
            head, tuple(Parameter(n, tuple(p.shape), frozen=not p.requires_grad) for n, p in own.items())
        )
        self.dtypes = {name: parameter.dtype for name, parameter in own.items()}  # in which they compute
        masters = trains and self.adapters is None and model.dtype != "float32"
        self._unread = dict(_loaded(model, "float32", head, seed).named_parameters()) if masters else own
        for name, buffer in list(self.model.named_buffers()):
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, buffer.to(self._device))
        if sharding.recompute:
            for block in self._blocks().values():
                _recompute(block)

    def forward(
        self, tokens: Tensor, mask: Tensor | None, hidden: Tensor | None = None, *, read: ReadOutputs = Outputs.whole
    ) -> Tensor:
        """Tokens [n, L] -> `read` of the outputs, which are logits, values or scores.

        `mask` int64 [n, L] is 0 on padding, or None if all padding is on the right. `read` is called in here
        because fully sharded ranks hold the head's weights only in a forward or backward pass.
        """
        inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        if self.plan.head == "tokens" and self._token_head is None:
            return read(Outputs(self.model(**inputs).logits))
        states = self.model.base_model(**inputs).last_hidden_state
        if self._token_head is None:
            return read(Outputs(states, number_head(self.model)))
        return read(Outputs(states, self._token_head, self._token_head.parameters(), self._chunk))

    def by_name(self) -> dict[str, nn.Parameter]:
        """The parameters by transformers' names, a tied one once."""
        return dict(self.model.named_parameters())

    def read(self, only: Container[str] | None = None) -> dict[str, Tensor]:
        """The parameters as they are stepped, on the model's device, by name; of those named `only`. Each only once."""
        names = [name for name in self._unread if only is None or name in only]
        return {name: self._unread.pop(name).detach().to(self._device) for name in names}

    def install(self, parameters: Mapping[str, nn.Parameter], only: Container[str] | None = None) -> None:
        """Set parameters by name, a tied one at all its places."""
        for first, parameter in parameters.items():
            for name in self._names[first]:
                module, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(module), leaf, parameter)

    def units(self) -> Iterator[tuple[nn.Module, set[str]]]:
        """The modules that FSDP gathers as units, inner ones first, and the names of their parameters."""
        left = {spec.name for spec in self.plan.specs}
        for prefix, block in self._blocks().items():
            own = {name for name in left if name.startswith(f"{prefix}.")}
            left -= own
            yield block, own
        yield self, left

    def constants(self) -> dict[str, Tensor]:
        """Copies of the persistent buffers in host memory: they are published, though not trained."""
        state = self.model.state_dict(keep_vars=True)
        return {n: t.to("cpu", copy=True) for n, t in state.items() if not isinstance(t, nn.Parameter)}

    def _tried_head(self) -> TokenHead | None:
        """The head by itself; None, with a line in the log, for a family whose forward pass can't be divided."""
        if (found := TokenHead.find(self.model)) is None:
            _log.warning("%s: logits of all positions are computed at once: its head can't be used by itself",
                         type(self.model).__name__)  # fmt: skip
        return found

    def _blocks(self) -> dict[str, nn.Module]:
        """The repeated layers by name: those that transformers does not split, else the longest list of modules.

        A block is left out if it is inside another one, or has a tied parameter, whose other place is outside of it.
        """
        kinds = set(getattr(self.model, "_no_split_modules", None) or ())
        modules = dict(self.model.named_modules())
        found = {name: module for name, module in modules.items() if type(module).__name__ in kinds}
        if not found:
            lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
            longest = max(lists, key=lambda name: len(lists[name]), default=None)
            if longest is not None:
                found = {f"{longest}.{number}": block for number, block in lists[longest].named_children()}
        tied = [name for names in self._names.values() if len(names) > 1 for name in names]
        return {
            name: module
            for name, module in found.items()
            if not any(name.startswith(f"{outer}.") for outer in found)
            and not any(inner.startswith(f"{name}.") for inner in tied)
        }


def _loaded(model: Model, dtype: Dtype, head: Head, seed: int | None) -> PreTrainedModel:
    if head == "score":
        return load_reward(model.path, dtype, seed, model.attention)
    return _LOADERS[head](model.path, dtype, model.attention)


def _recompute(block: nn.Module) -> None:
    plain = block.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*inputs, **options)
        return checkpoint(plain, *inputs, use_reentrant=False, **options)

    block.forward = forward
