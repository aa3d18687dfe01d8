"""Shard plans: the parameters of a decoder, the pipeline stage of each, and the dimension along which it is cut.

A plan follows from the sizes alone and allocates nothing. Names and shapes are those of transformers' checkpoints,
where the query, key, value, gate and up projections are separate matrices; `fused` names those that an engine keeps as
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import msgspec

Head = Literal["tokens", "value", "score"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
TOKEN_HEAD = "lm_head.weight"


class DecoderSizes(Protocol):
    """The sizes of a decoder that stages and tensor shards divide."""

    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


def indivisible(sizes: DecoderSizes, pp: int, tp: int) -> str:
    """The size that pp stages or tp tensor shards don't divide, with the numbers; "" if they divide all.

    Shard plans, and through them the checks of a recipe, and the planner use this one rule.
    """
    stages, ranks = f"over {pp} pipeline stages", f"over {tp} tensor-parallel ranks"
    for what, size, parts, where in (
        ("layers", sizes.layers, pp, stages),
        ("attention heads", sizes.heads, tp, ranks),
        ("key-value heads", sizes.kv_heads, tp, ranks),
        ("intermediate size", sizes.intermediate, tp, ranks),
        ("vocabulary", sizes.vocabulary, tp, ranks),
    ):
        if parts < 1 or size % parts:
            return f"{what} {size} can't be divided {where}"
    return ""


class Decoder(msgspec.Struct, frozen=True):
    """The sizes of a Llama, Mistral, Qwen2 or Qwen3 decoder, and its head."""

    family: str  # transformers' model_type
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool  # the token head is the embedding's matrix
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    head: Head = "tokens"  # logits; or one number per position: a value (with a bias) or a score (without)

    @classmethod
    def of(cls, config: Mapping[str, Any], head: Head = "tokens") -> Decoder:
        """Read a transformers config (its `to_dict()`). Raises ValueError for a decoder without a sharding plan."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {family!r} has no sharding plan: one of {', '.join(FAMILIES)}")
        odd = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
        if odd:
            raise ValueError(f"{family} with layers of type {', '.join(odd)}: only full_attention is sharded")
        if config.get("sliding_window") and (family == "mistral" or config.get("use_sliding_window")):
            window = config["sliding_window"]
            raise ValueError(f"{family} with a sliding window of {window} tokens: only full attention is sharded")
        heads = config["num_attention_heads"]
        bias = bool(config.get("attention_bias"))
        return cls(
            family=family,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")) and head == "tokens",
            qkv_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias")) and family == "llama",
            qk_norm=family == "qwen3",
            head=head,
        )


def has_plan(config: Mapping[str, Any]) -> bool:
    """Whether a model with this transformers config can be cut over ranks."""
    try:
        Decoder.of(config)
    except ValueError:
        return False
    return True


class Parameter(msgspec.Struct, frozen=True):
    """One tensor of the checkpoint and how tensor-parallel ranks share it."""

    name: str
    shape: tuple[int, ...]  # whole
    cut: int | None = None  # dimension divided over t; None: every rank of the stage holds it whole
    partial: bool = False  # held whole; each rank's gradient is that of its own heads, and the sum is the gradient
    fused: str = ""  # the matrix that an inference engine joins this one into, in the plan's order
    frozen: bool = False  # not trained: it has no gradient and is in no checkpoint

    @property
    def elements(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)


class ShardPlan(msgspec.Struct, frozen=True):
    """A decoder on pp stages and tp tensor shards. Raises ValueError, with the numbers, if they don't divide it."""

    decoder: Decoder
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if reason := indivisible(self.decoder, self.pp, self.tp):
            raise ValueError(f"{self.decoder.family} decoder: {reason}")

    @property
    def head(self) -> Head:
        """The decoder's head."""
        return self.decoder.head

    def undivided(self) -> ShardPlan:
        """The same decoder on one rank."""
        return ShardPlan(self.decoder)

    def layers(self, stage: int) -> range:
        """The layers of a stage, by their number in the checkpoint. Raises ValueError for an unknown stage."""
        if not 0 <= stage < self.pp:
            raise ValueError(f"stage {stage} is not among the {self.pp} of this plan")
        each = self.decoder.layers // self.pp
        return range(stage * each, (stage + 1) * each)

    def parameters(self, stage: int) -> tuple[Parameter, ...]:
        """The parameters of a stage, each storage once: a tied head is listed if its embedding is on another stage."""
        own = [p for layer in self.layers(stage) for p in layer_parameters(self.decoder, layer)]
        return (*self.before_layers(stage), *own, *self.after_layers(stage))

    def before_layers(self, stage: int) -> tuple[Parameter, ...]:
        """The embedding, on the first stage."""
        d = self.decoder
        return (Parameter(EMBEDDING, (d.vocabulary, d.hidden), cut=0),) if stage == 0 else ()

    def after_layers(self, stage: int) -> tuple[Parameter, ...]:
        """The final norm and the head, on the last stage."""
        d = self.decoder
        if stage != self.pp - 1:
            return ()
        norm = Parameter(FINAL_NORM, (d.hidden,))
        match d.head:
            case "tokens":
                head = Parameter(TOKEN_HEAD, (d.vocabulary, d.hidden), cut=0)
                return (norm,) if d.tied and self.pp == 1 else (norm, head)
            case "value":
                return norm, Parameter("score.weight", (1, d.hidden)), Parameter("score.bias", (1,))
            case "score":
                return norm, Parameter("score.weight", (1, d.hidden))

    def stage_of(self, parameter: Parameter) -> int:
        """The stage that holds a parameter."""
        if parameter.name.startswith("model.layers."):
            return int(parameter.name.split(".")[2]) // (self.decoder.layers // self.pp)
        return 0 if parameter.name == EMBEDDING else self.pp - 1

    def source(self, parameter: Parameter) -> Parameter:
        """The parameter that a checkpoint has for this one: the embedding for a tied head."""
        if parameter.name == TOKEN_HEAD and self.decoder.tied:
            return self.before_layers(0)[0]
        return parameter

    def written_by(self, stage: int, tensor_index: int) -> list[Parameter]:
        """The parameters that one stage and tensor index writes to a checkpoint, so that each entry is written once."""
        return [
            parameter
            for parameter in self.parameters(stage)
            if (parameter.cut is not None or tensor_index == 0) and self.source(parameter) == parameter
        ]

    @property
    def tied_across_stages(self) -> bool:
        """Whether the first stage's embedding and the last stage's head are two copies of one matrix."""
        return self.decoder.tied and self.pp > 1

    def shard_shape(self, parameter: Parameter) -> tuple[int, ...]:
        """The shape of a parameter's shard."""
        return tuple(n // self.tp if i == parameter.cut else n for i, n in enumerate(parameter.shape))

    def shard_start(self, parameter: Parameter, tensor_index: int) -> tuple[int, ...]:
        """The index in the whole parameter at which the shard of a tensor index begins."""
        return tuple(n // self.tp * tensor_index if i == parameter.cut else 0 for i, n in enumerate(parameter.shape))

    def shard_elements(self, parameter: Parameter) -> int:
        """Number of entries in a parameter's shard."""
        return math.prod(self.shard_shape(parameter))


def layer_parameters(decoder: Decoder, layer: int) -> Iterator[Parameter]:
    """The parameters of one layer: projections into heads and neurons are cut by rows, those out of them by columns."""
    d, prefix = decoder, f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    yield Parameter(f"{prefix}.input_layernorm.weight", (d.hidden,))
    for name, heads in (("q_proj", d.heads), ("k_proj", d.kv_heads), ("v_proj", d.kv_heads)):
        fused, rows = f"{attention}.qkv_proj", heads * d.head_size
        yield from _linear(f"{attention}.{name}", (rows, d.hidden), 0, d.qkv_bias, fused)
    if d.qk_norm:
        yield Parameter(f"{attention}.q_norm.weight", (d.head_size,), partial=True)
        yield Parameter(f"{attention}.k_norm.weight", (d.head_size,), partial=True)
    yield from _linear(f"{attention}.o_proj", (d.hidden, d.heads * d.head_size), 1, d.output_bias)
    yield Parameter(f"{prefix}.post_attention_layernorm.weight", (d.hidden,))
    for name in ("gate_proj", "up_proj"):
        yield from _linear(f"{mlp}.{name}", (d.intermediate, d.hidden), 0, d.mlp_bias, f"{mlp}.gate_up_proj")
    yield from _linear(f"{mlp}.down_proj", (d.hidden, d.intermediate), 1, d.mlp_bias)


def _linear(name: str, shape: tuple[int, int], cut: int, bias: bool, fused: str = "") -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", shape, cut=cut, fused=f"{fused}.weight" if fused else "")
    if bias:  # cut with the rows that it is added to; whole on every rank if it is added to the sum over columns
        yield Parameter(f"{name}.bias", shape[:1], cut=0 if cut == 0 else None, fused=f"{fused}.bias" if fused else "")
