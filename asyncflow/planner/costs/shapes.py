"""Model shapes: the sizes of a decoder that determine its cost, from a transformers config or by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from workers.parallel.plan import has_plan

WEIGHT_BYTES = 2  # bfloat16
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Shape(msgspec.Struct, frozen=True):
    """A dense decoder with gated feed-forward layers and grouped attention."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int = 0  # 0: hidden / heads
    tied: bool = False  # input and output embeddings share one matrix
    outputs: int = 0  # columns of the head; 0: the vocabulary, 1: a value head
    shardable: bool = True  # its family has a plan for pipeline stages and tensor shards

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary"):
            if (size := getattr(self, field)) < 1:
                raise ValueError(f"shape {self.name}: {field} is {size}, but must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"shape {self.name}: {self.kv_heads} KV heads do not divide {self.heads} heads")

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> Shape:
        """Read a transformers config. Raises ValueError for a missing size or a mixture of experts."""
        if experts := next((config[key] for key in EXPERTS if config.get(key)), 0):
            raise ValueError(f"shape {name}: {experts} experts; only dense decoders are supported")
        keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        if missing := [key for key in keys if not config.get(key)]:
            raise ValueError(f"shape {name}: the config has no {', '.join(missing)}")
        layers, hidden, intermediate, heads, vocabulary = (int(config[key]) for key in keys)
        return cls(
            name,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            vocabulary=vocabulary,
            head_size=int(config.get("head_dim") or 0),
            tied=bool(config.get("tie_word_embeddings", False)),
            shardable=has_plan(config),
        )

    def scoring(self) -> Shape:
        """The same model with a value head: a critic or a reward model."""
        return msgspec.structs.replace(self, outputs=1, tied=False)

    @property
    def head_dimension(self) -> int:
        """Columns of one attention head."""
        return self.head_size or self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: four attention matrices, three feed-forward matrices, two norms."""
        attention = 2 * self.hidden * self.head_dimension * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        """Weights of the head, also if they are the embedding's."""
        return self.hidden * (self.outputs or self.vocabulary)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.stage_parameters(1)

    def stage_parameters(self, pp: int) -> int:
        """Number of weights of the largest of pp stages. The first stage has the embedding, the last one the head."""
        ends = (self.vocabulary * self.hidden, self.head_parameters)
        layers = self.layer_parameters * self.layers // pp
        if pp == 1:
            return layers + ends[0] + (0 if self.tied else ends[1]) + self.hidden
        return layers + max(ends)

    def forward_flops(self, context: float) -> float:
        """Flops of a token's forward pass: 2 per weight, 4 per attention column and token of context."""
        weights = self.layer_parameters * self.layers + self.head_parameters
        return 2 * weights + 4 * self.layers * context * self.heads * self.head_dimension

    def stage_flops(self, pp: int, context: float) -> float:
        """Flops of a token's forward pass through the slowest of pp stages: the last one, with the head."""
        layers = 2 * self.layer_parameters + 4 * context * self.heads * self.head_dimension
        return layers * self.layers / pp + 2 * self.head_parameters

    def kv_bytes(self, pp: int, tp: int) -> float:
        """Bytes of one token's keys and values on one of pp x tp ranks; heads are repeated if tp exceeds them."""
        return 2 * WEIGHT_BYTES * self.layers / pp * -(-self.kv_heads // tp) * self.head_dimension


LLAMA = {
    "7B": Shape("llama-7B", 32, 4096, 11008, 32, 32, 32000),
    "13B": Shape("llama-13B", 40, 5120, 13824, 40, 40, 32000),
    "34B": Shape("llama-34B", 48, 8192, 22016, 64, 8, 32000),
    "70B": Shape("llama-70B", 80, 8192, 28672, 64, 8, 32000),
}
