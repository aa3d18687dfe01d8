"""What the first two steps of RLHF are told: supervised fine-tuning and the reward model. Torch-free."""

from __future__ import annotations

from typing import Literal

import msgspec

from workers.settings import Dtype, Optimizer


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long to train and how fast: the rate rises over the optimizer's warmup_steps, then decays as named."""

    steps: int
    batch_size: int = 64  # rows in one optimizer step
    learning_rate: float = 1e-3
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    seed: int = 0  # order of the rows, and the fresh score head of a reward model
    tokens_per_micro_batch: int = 8192  # padded tokens in one forward

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "tokens_per_micro_batch"):
            if not getattr(self, name) > 0:  # NaN is refused, too
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class SftSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Supervised fine-tuning of a language model on demonstrations."""

    model: str  # transformers folder to start from
    data: str  # a file or folder of workers.data.datasets.Demonstration
    output: str  # transformers folder to write; must not exist
    schedule: Schedule
    optimizer: Optimizer = Optimizer(warmup_steps=10)
    columns: dict[str, str] = {}  # field -> its name in the file
    dtype: Dtype = "float32"


class RewardModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Bradley-Terry reward model from preference pairs, or a cost model from pairs whose `chosen` is the safer."""

    model: str  # transformers folder to start from: a language model's or a reward model's
    data: str  # a file or folder of workers.data.datasets.Preference
    heldout: str  # pairs that are only evaluated
    output: str  # transformers folder to write; must not exist
    schedule: Schedule
    optimizer: Optimizer = Optimizer(warmup_steps=10)
    columns: dict[str, str] = {}  # field -> its name in both files
    kind: Literal["reward", "cost"] = "reward"  # cost: rows of workers.data.datasets.SafetyPair, or PKU-SafeRLHF's
    centring: float = 0.01  # weight of (r_chosen + r_rejected)^2, which keeps a reward model's scores around 0
    dtype: Dtype = "float32"
