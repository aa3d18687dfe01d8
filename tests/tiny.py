"""Small models on disk: a character tokenizer and random Qwen2 networks, made in well under a second.

The head size is 32, the smallest that vLLM's CPU attention has a kernel for, so every folder serves every engine.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from protocols import weights
from protocols.data import ids
from protocols.data.jagged import Jagged
from protocols.data.messages import Prompts
from protocols.weights import Version
from workers.data.vocabulary import Vocabulary
from workers.generation.packed import PackedWeights
from workers.training.models import canonical_tensors

PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1
TOKENS = Vocabulary(frozenset({EOS_ID}))
CHARACTERS = string.digits + string.ascii_lowercase + "+-*=:.,? "
VOCABULARY = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
HEAD_SIZE = 32


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character and no merges; unknown characters become padding."""
    characters = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=PAD, eos_token=EOS)


def config(
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
    context: int = 1024,
    vocabulary: int = len(VOCABULARY),
) -> Qwen2Config:
    """A Qwen2 of 0.2 million parameters with hidden size heads x 32. `vocabulary` may exceed the tokenizer's."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=heads * HEAD_SIZE,
        intermediate_size=heads * HEAD_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # so that distributions are not uniform, and differ between seeds
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )


def make_policy(folder: str | Path, seed: int = 0, tied: bool = True, **shape: int) -> Path:
    """A random language model and its tokenizer as a transformers folder; `shape` goes to `config`."""
    return save_random(Qwen2ForCausalLM, config(tied=tied, **shape), folder, seed)


def make_reward(folder: str | Path, seed: int = 0, **shape: int) -> Path:
    """A random reward model (one label) and its tokenizer as a transformers folder; `shape` goes to `config`."""
    reward_config = config(tied=True, **shape)
    reward_config.num_labels = 1
    return save_random(Qwen2ForSequenceClassification, reward_config, folder, seed)


def make_gpt2(folder: str | Path, seed: int = 0, *, reward: bool = False, vocabulary: int = len(VOCABULARY)) -> Path:
    """A family without a sharding plan: other names, learned positions, dropout, layers whose weight is transposed."""
    shape = GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1,
        bos_token_id=None, eos_token_id=EOS_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    shape.num_labels = 1
    assert shape.resid_pdrop == shape.attn_pdrop == 0.1
    return save_random(GPT2ForSequenceClassification if reward else GPT2LMHeadModel, shape, folder, seed)


def save_random(kind: Callable[[Any], PreTrainedModel], shape: PreTrainedConfig, folder: str | Path, seed: int) -> Path:
    """A random model of a class, or of what makes one from its config, and the tokenizer as a transformers folder."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(shape)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # initially 0 or 1, where a loader that skips them would go unnoticed
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return Path(folder)


def encode(text: str) -> npt.NDArray[np.int32]:
    """Token ids of a text over `CHARACTERS`."""
    return np.array([VOCABULARY[c] for c in text], np.int32)


def make_prompts(
    texts: Sequence[str], samples: int = 1, *, epoch: int = 0, first: int = 0, references: Iterable[str] | None = None
) -> Prompts:
    """`samples` rows per text, in id order; prompt i has ordinal `first + i` in data epoch `epoch`."""
    answers = list(references) if references is not None else [""] * len(texts)
    rows = [(i, index) for i in range(len(texts)) for index in range(samples)]
    return Prompts(
        sample_ids=np.array([ids.sample_id(ids.prompt_id(epoch, first + i), index) for i, index in rows], np.int64),
        prompts=Jagged.from_rows([encode(texts[i]) for i, _ in rows], np.int32),
        references=Jagged.from_texts(answers[i] for i, _ in rows),
        min_versions=np.zeros(len(rows), np.int64),
    )


def publish(model: PreTrainedModel, version: Version, probe: str = "", tolerance: float = 1e-3) -> PackedWeights:
    """The model's canonical tensors as a manifest and its buffer; with `probe`, log-probs of that text as its probe."""
    proof = None
    if probe:
        tokens = encode(probe)
        proof = weights.Probe([tokens.tolist()], [log_probs(model, tokens[:1], tokens[1:]).tolist()], tolerance)
    return PackedWeights.publish(version, canonical_tensors(model), proof)


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    prompt: npt.NDArray[np.int32],
    response: npt.NDArray[np.int32],
    temperature: float = 1.0,
    *,
    known: int | None = None,
) -> npt.NDArray[np.float32]:
    """Log-probs of the response's tokens, float32 [T], from a forward pass of this row alone.

    `known`: the number of ids that may be sampled, where the model has further rows.
    """
    row = torch.tensor(np.concatenate([prompt, response])[None], dtype=torch.int64)
    logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1, :known].float() / temperature
    return logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None]).squeeze(-1).numpy()
