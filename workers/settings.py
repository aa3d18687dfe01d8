"""What a worker is told: one small typed struct per concern, shared by the recipe and the workers.

Torch-free, so that a recipe is checked before anything heavy is imported.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["float32", "bfloat16"]
Aggregation = Literal["token-mean", "sequence-mean-token-sum", "sequence-mean-token-mean"]


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One role's model: a transformers folder, or for rewards a rule."""

    path: str = ""  # transformers folder
    rule: str = ""  # registered rule name, or "package.module:function"
    learning_rate: float = 0.0  # trained roles only
    dtype: Dtype = "float32"


class Loss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policy's and critic's loss, and how a step is cut into optimizer steps."""

    name: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0  # bound on the loss where the advantage is negative; 0: none
    value_clip: float = 0.2  # 0: none
    aggregation: Aggregation = "token-mean"
    epochs: int = 1
    mini_batches: int = 1
    tokens_per_micro_batch: int = 8192  # padded tokens in one forward


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
    """What happens to a sample whose reward can't be computed."""

    reward_timeout_seconds: float = 30.0
    reward_retries: int = 1  # further attempts before the sample is failed
