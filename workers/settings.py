"""What a worker is told: one small typed struct per concern, shared by the recipe and the workers.

Torch-free, so that a recipe is checked before anything heavy is imported.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Dtype = Literal["float32", "bfloat16"]
Aggregation = Literal["token-mean", "sequence-mean-token-sum", "sequence-mean-token-mean", "sequence-mean-fixed-length"]
Correction = Literal["none", "importance", "tis", "icepop"]
KlEstimator = Literal["k1", "k2", "k3"]


class RewardPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a mixed reward: a rule or a trained model, and how much it counts."""

    name: str  # under which its mean is told, as reward.<name>
    path: str = ""  # transformers folder
    rule: str = ""  # registered rule name, or "package.module:function"
    weight: float = 1.0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"mix: name = {self.name!r}: want a word of letters, digits and '_'")
        if bool(self.path) == bool(self.rule):
            raise ValueError(f"mix {self.name}: give a path or a rule, one of them")
        if not math.isfinite(self.weight) or not self.weight:
            raise ValueError(f"mix {self.name}: weight = {self.weight}: want a finite number, not 0")


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Low-rank adapters to train in the place of the whole policy."""

    rank: int = 0  # 0: no adapters, all weights train
    alpha: float = 0.0  # an adapter counts alpha / rank; 0: twice the rank
    targets: list[str] = []  # last names of the layers to adapt, as "q_proj"; none: all linear ones but the output head
    publish: Literal["merged", "adapters"] = "merged"  # what a generator is sent; of adapters it merges by itself

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0.0 <= self.alpha < math.inf:
            raise ValueError(f"lora: rank = {self.rank}, alpha = {self.alpha}: want 0 or more")
        if not self.rank and (self.alpha or self.targets or self.publish == "adapters"):
            raise ValueError("lora: rank = 0 trains all weights: give a rank of 1 or more, or leave lora out")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank if self.alpha else 2.0


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One role's model: a transformers folder, or for rewards a rule, a mix of both, or an outside worker."""

    path: str = ""  # transformers folder
    rule: str = ""  # registered rule name, or "package.module:function"
    mix: list[RewardPart] = []  # of a reward: the weighted sum of these
    outside: bool = False  # answered by a program or a person outside of the run
    learning_rate: float = 0.0  # trained roles only
    dtype: Dtype = "float32"
    lora: Lora = Lora()  # the policy only

    @property
    def folders(self) -> list[str]:
        """The transformers folders that it is loaded from."""
        return [part.path for part in (self, *self.mix) if part.path]

    @property
    def rules(self) -> list[str]:
        """The rules that it asks."""
        return [part.rule for part in (self, *self.mix) if part.rule]


class Loss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policy's and critic's loss, and how a step is cut into optimizer steps.

    prox are the weights at the start of the step, mu those that drew the token. Raises ValueError for a value that
    has no meaning.
    """

    policy: str = "ppo"  # a name of workers.losses, or "package.module:function"
    old: Literal["prox", "mu"] = "prox"  # whose probability the ratio divides by
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0  # bound on the loss where the advantage is negative; 0: none
    correction: Correction = "none"  # a token's weight, from prox / mu; "importance" makes ppo decoupled PPO; a recipe
    # with staleness has "tis" unless it says otherwise
    tis_cap: float = 2.0  # tis: larger weights are cut to it
    icepop_low: float = 0.5  # icepop: tokens outside of low..high weigh nothing
    icepop_high: float = 5.0
    sequence_low: float = 0.0  # sequences whose mean prox / mu is below weigh nothing; 0: no lower bound
    sequence_high: float = 0.0  # and those above; 0: no upper bound
    kl_coefficient: float = 0.0  # of the KL to the reference inside the loss, corrected like its policy loss; 0: none
    kl_estimator: KlEstimator = "k3"
    entropy_coefficient: float = 0.0  # of the entropy bonus; 0: none
    ptx_coefficient: float = 0.0  # of the pretraining loss, whose text is a recipe's data.pretrain; 0: none
    ptx_rows: int = 32  # rows of pretraining text in one optimizer step
    value_clip: float = 0.2  # 0: none
    aggregation: Aggregation = "token-mean"
    fixed_length: int = 0  # tokens: what sequence-mean-fixed-length divides by; 0: a recipe's generation.max_tokens
    epochs: int = 1
    mini_batches: int = 1
    tokens_per_micro_batch: int = 8192  # padded tokens in one forward

    def __post_init__(self) -> None:
        conditions = {  # so written, NaN is refused too
            "clip_low": (0.0 <= self.clip_low <= 1.0, "0 to 1"),
            "clip_high": (self.clip_high >= 0.0, "0 or more"),
            "dual_clip": (self.dual_clip == 0.0 or self.dual_clip > 1.0, "more than 1, or 0 for none"),
            "tis_cap": (self.tis_cap > 0.0, "more than 0"),
            "icepop_low": (0.0 <= self.icepop_low < self.icepop_high, "0 or more, and less than icepop_high"),
            "sequence_low": (self.sequence_low >= 0.0, "0 or more"),
            "sequence_high": (
                self.sequence_high == 0.0 or self.sequence_high > self.sequence_low,
                "more than sequence_low, or 0 for none",
            ),
            "kl_coefficient": (0.0 <= self.kl_coefficient < math.inf, "0 or more"),
            "entropy_coefficient": (abs(self.entropy_coefficient) < math.inf, "a finite number"),
            "ptx_coefficient": (0.0 <= self.ptx_coefficient < math.inf, "0 or more"),
            "ptx_rows": (self.ptx_rows >= 1, "1 or more"),
            "value_clip": (self.value_clip >= 0.0, "0 or more"),
            "fixed_length": (self.fixed_length >= 0, "0 or more"),
        }
        for name, (holds, wanted) in conditions.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}: want {wanted}")
        if self.old == "mu" and self.corrects:
            raise ValueError(
                "old = 'mu' takes the ratio to the weights that drew: a correction or a sequence mask would "
                "weigh the same difference twice; leave them out, or take old = 'prox'"
            )

    @property
    def corrects(self) -> bool:
        """Whether tokens or sequences are weighed by prox / mu."""
        return self.correction != "none" or self.sequence_low > 0.0 or self.sequence_high > 0.0


class Optimizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW and its schedule."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float = 1.0  # global norm; 0: none
    warmup_steps: int = 0  # linear, in optimizer steps
    decay_steps: int = 0  # of a run: linear to 0 by that optimizer step; 0: constant. The first two steps have Schedule


class Generation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rollouts are drawn and by which engine."""

    engine: Literal["vllm", "torch"] = "vllm"
    max_tokens: int = 64
    temperature: float = 1.0
    slots: int = 256  # rows generated at the same time
    kv_cache_bytes: int = 128 * 1024 * 1024
    max_model_tokens: int = 0  # prompt + response; 0: what the model allows
    probe_tolerance: float = 1e-3  # log-prob difference that still proves a publication; raise it for bfloat16


class Failures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to a sample whose reward can't be computed. Raises ValueError for a time that is none."""

    reward_timeout_seconds: float = 30.0
    reward_retries: int = 1  # further attempts before the sample is failed
    restarts: int = 3  # of each service that only answers; its next death ends the run
    outside_timeout_seconds: float = 300.0  # without an outside worker's answer the sample is failed
    outside_retake_seconds: float = 60.0  # rows that a worker took and did not answer are given to another one

    def __post_init__(self) -> None:
        for name in ("outside_timeout_seconds", "outside_retake_seconds"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: want a number of seconds above 0")
