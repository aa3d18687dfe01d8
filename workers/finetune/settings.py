"""Settings of the first two steps of RLHF: supervised fine-tuning, reward and cost models. Free of torch imports."""

from __future__ import annotations

from typing import Literal

import msgspec

from workers.settings import Attention, Chat, Dtype, Lora, NonNegativeInt, Optimizer, Positive, PositiveInt, Settings


class Schedule(Settings, frozen=True):
    """Number of steps, batch size and learning rate, which rises over the optimizer's warmup_steps and then decays."""

    steps: PositiveInt  # optimizer steps
    batch_size: PositiveInt = 64  # rows in one optimizer step
    learning_rate: Positive = 1e-3  # the highest, after the warm-up
    decay: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up, to optimizer.floor at the last step
    seed: int = 0  # of the order of the rows, of dropout, and of a reward model's new score head
    tokens_per_micro_batch: PositiveInt = 8192  # padded tokens in one forward


class FineTuning(Settings, frozen=True):
    """What each of them says: where the model starts from, its data, and its schedule.

    Relative paths start at the working directory, wherever the settings' file is.
    """

    model: str  # transformers folder to start from
    data: str  # a file or folder of rows
    output: str  # transformers folder to write; must not exist
    schedule: Schedule
    optimizer: Optimizer = Optimizer(warmup_steps=10)
    columns: dict[str, str] = msgspec.field(default_factory=dict)  # field -> its name in the files
    dtype: Dtype = "float32"  # of the weights
    chat: Chat = Chat()
    lora: Lora = Lora()  # a reward or cost model trains its score head as well; `publish` is for RL
    attention: Attention = "sdpa"  # eager for a family without it; flash_attention_2: bfloat16, on a GPU
    head_chunk: NonNegativeInt = 0  # response tokens whose logits exist at once; 0: 256 MiB of them in float32
    recompute: bool = False  # keep one activation per layer and recompute the others: less memory
    heldout: str = ""  # rows like those of `data`, for evaluation only; "": none
    evaluate_every: NonNegativeInt = (
        0  # steps between evaluations of `heldout`; 0: only before the first, after the last
    )


class SftSettings(FineTuning, frozen=True):
    """Supervised fine-tuning of a language model on rows of workers.data.datasets.Demonstration.

    The loss is that of the responses, each with the token that ends it: in a conversation the one that ends a turn in
    the chat template, which the output's generation_config.json then names, else the tokenizer's eos token.
    """

    # Rows with more tokens than the model's context: "skip" leaves them out, "cut" ends their responses there.
    overlong: Literal["refuse", "skip", "cut"] = "refuse"
    dropout: bool = False  # apply the dropout rates of the model's config.json; RL never does
    samples: NonNegativeInt = 4  # prompts that are answered before and after, of `heldout` or else of `data`
    sample_tokens: PositiveInt = 128  # of one of these answers, at most


class RewardModelSettings(FineTuning, frozen=True, kw_only=True):
    """A Bradley-Terry reward model from preference pairs, or a cost model from pairs whose `chosen` is the safer.

    It starts from a language model or a reward model, and has rows of workers.data.datasets.Preference.
    """

    kind: Literal["reward", "cost"] = "reward"  # cost: rows of workers.data.datasets.SafetyPair, or PKU-SafeRLHF's
    centring: float = 0.01  # weight of (r_chosen + r_rejected)^2, which keeps a reward model's scores around 0
    overlong: Literal["refuse", "skip"] = "refuse"  # pairs with more tokens than the model's context; "skip": left out
