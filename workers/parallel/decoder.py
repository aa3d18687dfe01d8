"""One rank's shard of a decoder: its stage's layers with its part of their heads and neurons.

The layers are transformers' own, built from a config with 1/t of the heads and neurons; two hooks and a linear layer
add the communication between ranks. torch's DTensor plans are not used, because they untie embeddings, mix badly with
plain tensors in norms and clipping, cost milliseconds per token when decoding, and hide the storage that the hybrid
engine arranges: every cut parameter lies in memory along its cut, so that the shards of t ranks, one after another,
are the whole tensor.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Container, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from workers.parallel.groups import RankGroup, copied, joined, summed
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Parameter, ShardPlan, layer_parameters
from workers.training.attention import reads_mask
from workers.training.outputs import Outputs, ReadOutputs, chunk_of


class VocabularyEmbedding(nn.Module):
    """An embedding of which this rank holds some rows: tokens [n, L] to the sum over the ranks, [n, L, H]."""

    def __init__(self, rows: int, hidden: int, padding_id: int | None, group: RankGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden))
        self._first = group.index * rows
        inside = padding_id is not None and self._first <= padding_id < self._first + rows
        self._padding_row = padding_id - self._first if inside and padding_id is not None else None
        self._group = group

    def forward(self, tokens: Tensor) -> Tensor:
        if self._group.size == 1:
            return functional.embedding(tokens, self.weight, self._padding_row)
        rows = tokens - self._first
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        found = functional.embedding(rows.masked_fill(elsewhere, 0), self.weight, self._padding_row)
        return summed(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self._group)


class RowLinear(nn.Linear):
    """A linear layer whose inputs are divided over the ranks: their results are summed, and the bias is added once."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: RankGroup) -> None:
        super().__init__(inputs, outputs, bias)
        self._group = group

    def forward(self, input: Tensor) -> Tensor:
        if self._group.size == 1:
            return functional.linear(input, self.weight, self.bias)
        output = summed(functional.linear(input, self.weight), self._group)
        return output if self.bias is None else output + self.bias


class DecoderShard(nn.Module):
    """The shard at one stage and tensor index. Parameters have the checkpoint's names and are empty until `install`.

    Dropout is never applied: a row must not depend on which rank computes it.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: ShardPlan,
        stage: int,
        tensor_group: RankGroup,
        recompute: bool = False,
        head_chunk: int = 0,
    ) -> None:
        """`head_chunk`: see `workers.training.outputs.chunk_of`."""
        super().__init__()
        self._chunk = chunk_of(head_chunk, plan.decoder.vocabulary)
        self.reads_mask = reads_mask(config)
        self.plan = plan
        self.stage = stage
        self._group = tensor_group
        self._recompute = recompute
        self._config = _narrowed(config, plan)
        family = plan.decoder.family
        modeling, prefix = importlib.import_module(f"transformers.models.{family}.modeling_{family}"), family.title()
        with torch.device("meta"):
            layers = {str(i): self._layer(getattr(modeling, f"{prefix}DecoderLayer"), i) for i in plan.layers(stage)}
            self.model = nn.ModuleDict({"layers": nn.ModuleDict(layers)})
            if self.is_first:
                padding = getattr(config, "pad_token_id", None)
                rows = plan.decoder.vocabulary // plan.tp
                self.model["embed_tokens"] = VocabularyEmbedding(rows, plan.decoder.hidden, padding, tensor_group)
            if self.is_last:
                self.model["norm"] = getattr(modeling, f"{prefix}RMSNorm")(plan.decoder.hidden, config.rms_norm_eps)
                self._add_head()
        self._rotary = getattr(modeling, f"{prefix}RotaryEmbedding")(self._config)
        self.eval()

    @property
    def is_first(self) -> bool:
        """Whether its inputs are tokens, not the activations of the stage before."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether its outputs are logits or values, not activations."""
        return self.stage == self.plan.pp - 1

    def install(self, parameters: Mapping[str, nn.Parameter], only: Container[str] | None = None) -> None:
        """Set the parameters of `plan.parameters(stage)`, by name; a tied head becomes its stage's embedding.

        With `only`, the parameters of these names; the others stay. Raises ValueError if a name is missing or unknown,
        or if a shape is not the shard's.
        """
        expected = {
            p.name: self.plan.shard_shape(p) for p in self.plan.parameters(self.stage) if only is None or p.name in only
        }
        if parameters.keys() != expected.keys():
            odd = sorted(parameters.keys() ^ expected.keys())[:5]
            raise ValueError(f"stage {self.stage}: parameters differ from the plan's in {odd}")
        for name, parameter in parameters.items():
            if tuple(parameter.shape) != expected[name]:
                raise ValueError(
                    f"stage {self.stage}: {name} has shape {list(parameter.shape)}, its shard {list(expected[name])}"
                )
            self._set(name, parameter)
        if self.is_first and self.is_last and self.plan.decoder.tied:
            self._set(TOKEN_HEAD, self.get_parameter(EMBEDDING))

    def by_name(self) -> dict[str, nn.Parameter]:
        """The parameters by name, a tied one once."""
        return dict(self.named_parameters())

    def units(self) -> Iterator[tuple[nn.Module, set[str]]]:
        """The modules that FSDP gathers as units, inner ones first, and the names of their parameters."""
        left = {spec.name for spec in self.plan.parameters(self.stage)}
        for index in self.plan.layers(self.stage):
            names = {spec.name for spec in layer_parameters(self.plan.decoder, index)}
            left -= names
            yield self.get_submodule(f"model.layers.{index}"), names
        yield self, left

    def clear(self) -> None:
        """Free the parameters: a call before the next `install` fails, and does not compute with old weights."""
        for name, parameter in list(self.named_parameters(remove_duplicate=False)):
            self._set(name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(module), leaf, parameter)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        hidden: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        read: ReadOutputs = Outputs.whole,
    ) -> Tensor:
        """Tokens [n, L] to activations [n, L, H]; on the last stage to `read` of the outputs.

        These are logits [n, L, V], or values or scores [n, L, 1].

        `hidden` [n, L, H] are the activations of the stage before, except on the first. `mask` int64 [n, cached + L] is
        0 on padding, or None without a cache if all padding is on the right; `positions` int64 [n or 1, L] count from 0
        by default; `cache` is this stage's own and takes the new keys and values. With `last_only` the last stage
        returns the last position only, [n, 1, ...]. All ranks of a tensor group call, and get the same result.
        """
        states = cast(Tensor, self.model["embed_tokens"](tokens) if hidden is None else hidden)
        if positions is None:
            cached = 0 if mask is None else mask.shape[1] - tokens.shape[1]
            positions = torch.arange(cached, cached + tokens.shape[1], device=tokens.device).unsqueeze(0)
        options = {
            "attention_mask": create_causal_mask(self._config, states, mask, cache, position_ids=positions),
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
            "position_embeddings": self._rotary(states, positions),
        }
        for layer in self.model["layers"].children():
            if self._recompute and torch.is_grad_enabled():
                states = cast(Tensor, checkpoint(layer, states, use_reentrant=False, **options))
            else:
                states = layer(states, **options)
        if not self.is_last:
            return states
        return read(self._outputs(self.model["norm"](states[:, -1:] if last_only else states)))

    def _outputs(self, hidden: Tensor) -> Outputs:
        """The ranks of a tensor group read the same chunks in the same order: each is joined from all of them."""
        if self.plan.decoder.head != "tokens":
            return Outputs(hidden, self.get_submodule("score"))
        head = self.get_submodule("lm_head")
        return Outputs(
            copied(hidden, self._group),
            lambda states: joined(head(states), self._group),
            list(head.parameters()),
            self._chunk,
        )

    def _layer(self, kind: Any, index: int) -> nn.Module:
        """A layer with 1/t of the heads and neurons; outputs and input gradients are summed over the ranks."""
        layer = kind(self._config, index - self.plan.layers(self.stage).start)  # its index in the stage's cache
        if self._group.size > 1:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(lambda module, inputs, output: copied(output, self._group))
            layer.self_attn.o_proj = self._row_linear(layer.self_attn.o_proj)
            layer.mlp.down_proj = self._row_linear(layer.mlp.down_proj)
        return layer

    def _row_linear(self, linear: nn.Linear) -> RowLinear:
        return RowLinear(linear.in_features, linear.out_features, linear.bias is not None, self._group)

    def _add_head(self) -> None:
        d = self.plan.decoder
        if d.head == "tokens":
            self.lm_head = nn.Linear(d.hidden, d.vocabulary // self.plan.tp, bias=False)
        else:
            self.score = nn.Linear(d.hidden, 1, bias=d.head == "value")


def _narrowed(config: PretrainedConfig, plan: ShardPlan) -> PretrainedConfig:
    """The config of a decoder with 1/t of the heads and neurons, and the same head size."""
    narrow, d = copy.deepcopy(config), plan.decoder
    narrow.num_attention_heads = d.heads // plan.tp
    narrow.num_key_value_heads = d.kv_heads // plan.tp
    narrow.intermediate_size = d.intermediate // plan.tp
    narrow.head_dim = d.head_size  # it would be derived from the hidden size and the narrowed number of heads
    return narrow


def laid_out(tensor: Tensor, parameter: Parameter) -> Tensor:
    """The same values, in memory along the dimension that the parameter is cut by."""
    if parameter.cut is None:
        return tensor.contiguous()
    return tensor.movedim(parameter.cut, 0).contiguous().movedim(0, parameter.cut)


def flat(tensor: Tensor, parameter: Parameter) -> Tensor:
    """All entries in memory order, [elements]: a view. Raises RuntimeError for a tensor that is not `laid_out`."""
    return tensor.view(-1) if parameter.cut is None else tensor.movedim(parameter.cut, 0).view(-1)


def unflat(entries: Tensor, parameter: Parameter, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `flat`: a view of entries [elements] as a shard, or the whole tensor, of `shape`."""
    if parameter.cut is None:
        return entries.view(shape)
    moved = (shape[parameter.cut], *(n for i, n in enumerate(shape) if i != parameter.cut))
    return entries.view(moved).movedim(0, parameter.cut)
