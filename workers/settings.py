"""Settings of the workers: one small typed struct per concern, shared by the recipe and the workers.

A recipe's tables are these structs. The module does not import torch, so a recipe is checked before anything heavy
loads.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.inspect import FloatType, IntType, StructType, Type, type_info

from protocols.roles import Sampling

LARGEST = sys.float_info.max  # as an upper bound it means "finite"

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Finite = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Coefficient = Annotated[float, Meta(ge=0, le=LARGEST)]
FinitePositive = Annotated[float, Meta(gt=0, le=LARGEST)]

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Aggregation = Literal["token-mean", "sequence-mean-token-sum", "sequence-mean-token-mean", "sequence-mean-fixed-length"]
Correction = Literal["none", "importance", "tis", "icepop"]
KlEstimator = Literal["k1", "k2", "k3"]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all settings: the bound of a value stands in its field's type.

    msgspec enforces the bounds where a table is converted; `__post_init__` enforces them where a program constructs
    the settings. Raises ValueError for a value out of bounds.
    """

    def __post_init__(self) -> None:
        for name, kind in _fields_of(type(self)).items():
            if bound := violated_bound(kind, value := getattr(self, name)):
                raise ValueError(f"{name} = {value}: want {bound}")


@cache
def _fields_of(settings: type[Settings]) -> dict[str, Type]:
    info = type_info(settings)
    assert isinstance(info, StructType)
    return {field.name: field.type for field in info.fields}


def violated_bound(kind: Type, value: object) -> str:
    """The bound that a number of this type violates, in words ("1 or more"); "" for none. NaN violates every bound."""
    if not isinstance(kind, IntType | FloatType) or isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    low, strict, high = (kind.ge, False, kind.le) if kind.gt is None else (kind.gt, True, kind.le)
    if (low is None or (value > low if strict else value >= low)) and (high is None or value <= high):
        return ""
    if low == -LARGEST:
        return "a finite number"
    if high not in (None, LARGEST):
        return f"more than {low:g}, at most {high:g}" if strict else f"{low:g} to {high:g}"
    return (f"more than {low:g}" if strict else f"{low:g} or more") + (", and finite" if high else "")


class RewardPart(Settings, frozen=True):
    """One part of a mixed reward: a rule or a trained model, and its weight in the sum."""

    name: str  # its mean is reported as reward.<name>
    path: str = ""  # transformers folder
    rule: str = ""  # registered rule name, "package.module:function" or "file.py:function"
    check: bool = True  # call the rule once before the run; false: e.g. it needs a server that only the run has
    weight: Finite = 1.0  # not 0
    dtype: Dtype = "float32"  # of a model's weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.isidentifier():
            raise ValueError(f"mix: name = {self.name!r}: want a word of letters, digits and '_'")
        if bool(self.path) == bool(self.rule):
            raise ValueError(f"mix {self.name}: give a path or a rule, one of them")
        if not self.weight:
            raise ValueError(f"mix {self.name}: weight = {self.weight}: want a finite number, not 0")


class Lora(Settings, frozen=True):
    """Low-rank adapters, which train instead of the policy's own weights."""

    rank: NonNegativeInt = 0  # 0: no adapters, all weights train
    alpha: Coefficient = 0.0  # an adapter is scaled by alpha / rank; 0: alpha is twice the rank
    # Last names of the layers to adapt, e.g. "q_proj"; none: all linear ones and all experts, but not the LM head.
    targets: list[str] = []
    publish: Literal["merged", "adapters"] = "merged"  # what a generator receives; it merges adapters itself

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rank and (self.alpha or self.targets or self.publish == "adapters"):
            raise ValueError("lora: rank = 0 trains all weights: give a rank of 1 or more, or leave lora out")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank if self.alpha else 2.0


class Model(Settings, frozen=True):
    """One role's model: a transformers folder; a reward may also be a rule, a mix of both, or an external worker."""

    path: str = ""  # transformers folder
    rule: str = ""  # registered rule name, "package.module:function" or "file.py:function"
    check: bool = True  # call the rule once before the run; false: e.g. it needs a server that only the run has
    mix: list[RewardPart] = []  # reward only: the weighted sum of these
    outside: bool = False  # an external worker answers: a program or a person outside of the run
    learning_rate: float = 0.0  # of a trained role, which needs one above 0; after the warm-up
    dtype: Dtype = "float32"  # of the weights
    lora: Lora = Lora()  # policy only
    attention: Attention = "sdpa"  # eager for a family without it; flash_attention_2: bfloat16, on a GPU
    head_chunk: NonNegativeInt = 0  # response tokens whose logits exist at once; 0: 256 MiB of them in float32

    @property
    def folders(self) -> list[str]:
        """The transformers folders that it is loaded from."""
        return [part.path for part in (self, *self.mix) if part.path]

    @property
    def rules(self) -> list[str]:
        """The rules that it calls."""
        return [part.rule for part in (self, *self.mix) if part.rule]


class Loss(Settings, frozen=True):
    """The policy's and critic's loss, and how a step is split into optimizer steps.

    `prox` are the weights at the start of the step, `mu` the weights that sampled the token.
    """

    policy: str = "ppo"  # a name of workers.losses, or "package.module:function"
    # The ratio divides by the token's probability under "prox", the weights at the start of the step, or under "mu",
    # the weights that sampled it, which may be older.
    old: Literal["prox", "mu"] = "prox"
    clip_low: Fraction = 0.2  # the ratio is clipped to 1 - clip_low ..
    clip_high: NonNegative = 0.2  # .. 1 + clip_high
    dual_clip: float = 3.0  # bound on the loss where the advantage is negative, more than 1; 0: none
    # A token's weight, from prox / mu; "importance" makes ppo decoupled PPO. With staleness the default is "tis".
    correction: Correction = "none"
    tis_cap: Positive = 2.0  # tis: larger weights are truncated to it
    icepop_low: float = 0.5  # icepop: tokens whose weight is outside of low..high have weight 0
    icepop_high: float = 5.0  # see icepop_low
    sequence_low: NonNegative = 0.0  # sequences whose mean prox / mu is below have weight 0; 0: no lower bound
    sequence_high: float = 0.0  # sequences above it have weight 0, too; 0: no upper bound
    kl_coefficient: Coefficient = 0.0  # KL to the reference inside the loss, corrected like the policy loss; 0: none
    kl_estimator: KlEstimator = "k3"  # of kl_coefficient: k1 log ratio, k2 half its square, k3 never negative
    entropy_coefficient: Finite = 0.0  # entropy bonus; 0: none
    ptx_coefficient: Coefficient = 0.0  # pretraining loss, on the text of the recipe's data.pretrain; 0: none
    ptx_rows: PositiveInt = 32  # rows of pretraining text in one optimizer step
    value_clip: NonNegative = 0.2  # how far a step moves a critic's value before its loss is clipped; 0: none
    aggregation: Aggregation = "token-mean"  # how the losses of tokens become that of a batch
    fixed_length: NonNegativeInt = 0  # tokens, the divisor of sequence-mean-fixed-length; 0: generation.max_tokens
    epochs: PositiveInt = 1  # passes over a step's batch
    mini_batches: PositiveInt = 1  # optimizer steps in each pass
    tokens_per_micro_batch: PositiveInt = 8192  # padded tokens in one forward

    def __post_init__(self) -> None:
        super().__post_init__()
        conditions = {  # written so that NaN is refused too
            "dual_clip": (self.dual_clip == 0.0 or self.dual_clip > 1.0, "more than 1, or 0 for none"),
            "icepop_low": (0.0 <= self.icepop_low < self.icepop_high, "0 or more, and less than icepop_high"),
            "sequence_high": (
                self.sequence_high == 0.0 or self.sequence_high > self.sequence_low,
                "more than sequence_low, or 0 for none",
            ),
        }
        for name, (holds, wanted) in conditions.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}: want {wanted}")
        if self.old == "mu" and self.corrects:
            raise ValueError(
                "old = 'mu' divides by the probability under the weights that sampled: a correction or a sequence "
                "mask would weigh the same difference twice; leave them out, or take old = 'prox'"
            )

    @property
    def corrects(self) -> bool:
        """Whether tokens or sequences are weighted by prox / mu."""
        return self.correction != "none" or self.sequence_low > 0.0 or self.sequence_high > 0.0


class Optimizer(Settings, frozen=True):
    """AdamW and its schedule."""

    beta1: float = 0.9  # decay of the mean gradient
    beta2: float = 0.95  # decay of the mean squared gradient
    epsilon: float = 1e-8  # added to the root of the mean squared gradient
    weight_decay: float = 0.0  # decoupled, times the learning rate
    gradient_clip: float = 1.0  # global norm; 0: none
    warmup_steps: NonNegativeInt = 0  # optimizer steps of linear warmup
    decay_steps: NonNegativeInt = 0  # RL only: decay to the floor at that optimizer step; 0: constant
    decay: Literal["linear", "cosine"] = "linear"  # RL only: the shape of the decay
    floor: Fraction = 0.0  # the share of the learning rate that is left after the decay


class Generation(Settings, frozen=True):
    """How rollouts are sampled and by which engine."""

    engine: Literal["vllm", "torch"] = "vllm"  # what generates
    max_tokens: PositiveInt = 64  # of one response
    temperature: FinitePositive = 1.0  # of sampling; vllm takes 0.01 to 2
    # Sample from the likeliest tokens that have this probability together; 1: from all. Where this or the next two
    # truncate, log-probs are those of the distribution that remains, renormalised, in the trainer as in the engine.
    top_p: Share = 1.0
    top_k: NonNegativeInt = 0  # sample from the k likeliest tokens; 0: from all
    # Sample from the tokens with at least this share of the likeliest one's probability; 0: from all.
    min_p: Fraction = 0.0
    min_tokens: NonNegativeInt = 0  # so many tokens come before one that ends a response
    # Texts that end a response, special tokens written out, e.g. "</answer>" or "<|im_end|>". The token that completes
    # one is the response's last, whole, and is trained like an end-of-sequence token.
    stop: list[str] = []
    stop_token_ids: list[NonNegativeInt] = []  # ids that end a response, beside the model's own end tokens
    slots: PositiveInt = 256  # rows generated at the same time
    # Memory of vLLM's cache of keys and values, on each of its devices. 0: what `slots` rows need, at most 40 % of a
    # GPU's free memory, or a tenth of the machine's where it computes on the CPU
    kv_cache_bytes: NonNegativeInt = 0
    max_model_tokens: NonNegativeInt = 0  # prompt + response; 0: the longest prompt of the data + max_tokens
    # Largest root mean square difference, in nats, between an engine's log-probs of the probe batch and the trainer's;
    # 0: what the rounding of the model's dtype explains, which the trainer measures for each publication.
    probe_tolerance: Coefficient = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "vllm":
            refuse_in_vllm("temperature", self.temperature)
        if self.min_tokens >= self.max_tokens > 0:
            raise ValueError(
                f"min_tokens = {self.min_tokens}: want less than max_tokens = {self.max_tokens}, or no response can end"
            )
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every response at once; leave it out")

    @property
    def sampling(self) -> Sampling:
        """How rollouts are sampled."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
        )


def refuse_in_vllm(key: str, temperature: float) -> None:
    """Raise ValueError, with the key, for a temperature that vLLM refuses, or raises without a word."""
    if temperature and not 0.01 <= temperature <= 2.0:
        raise ValueError(f"{key} = {temperature:g}: vLLM samples at 0.01 to 2; engine = 'torch' takes any")


class Chat(Settings, frozen=True):
    """How rows become conversations, and how the tokenizer's chat template writes them."""

    system: str = ""  # the first message of conversations that have no system message; "": none
    from_text: bool = False  # a prompt that is a text is the user's message of a conversation; else it stays a text
    # Arguments of the template, e.g. { enable_thinking = false }; those in a row's chat_template_kwargs come before.
    arguments: dict[str, bool | int | float | str] = {}
    tools: str = "tools"  # name of the field with a row's tools, a list or the list as JSON; "": none are written

    def __post_init__(self) -> None:
        super().__post_init__()
        if taken := sorted({"messages", "tools", "add_generation_prompt"} & self.arguments.keys()):
            raise ValueError(f"arguments.{taken[0]}: every row's conversation has its own; leave it out")


class Failures(Settings, frozen=True):
    """What happens to a sample whose reward can't be computed, and to a service that dies."""

    reward_timeout_seconds: FinitePositive = 30.0  # of one call of a rule: a row, or the batch of a batch rule
    reward_retries: NonNegativeInt = 1  # further attempts before the sample is failed
    reward_backoff_seconds: NonNegative = 0.5  # before the first retry of a failed connection; doubles, up to 30 s
    # Rows of one rule scored at the same time on each rank of its service: the most processes of an ordinary rule, each
    # started when the rows that wait are worth it; the most calls in flight of an async rule, in one process.
    reward_concurrency: PositiveInt = 8
    # Memory of a rule's process, and of each that it starts: data, not mapped files; 0: no limit. At the limit the row
    # is tried again in a new process.
    reward_memory_bytes: NonNegativeInt = 4 << 30
    reward_output_bytes: NonNegativeInt = 1 << 18  # what one call may print before it fails like a late one; 0: all
    # Train the samples of a prompt without those that failed, where 2 or more are left. By default another prompt takes
    # its place: a rule that fails on some kinds of answers would otherwise leave these out of every group's mean.
    partial_groups: bool = False
    restarts: NonNegativeInt = 3  # of each service, within the window; the next death ends the run
    restart_window_seconds: FinitePositive = 3600.0  # deaths that are longer ago do not count
    outside_timeout_seconds: FinitePositive = 300.0  # without an external worker's answer the sample is failed
    outside_retake_seconds: FinitePositive = 60.0  # rows that a worker took and did not answer are given to another one
