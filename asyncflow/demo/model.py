"""An untrained language model for the demonstration's tasks: one token per character, about a million parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from asyncflow.demo.task import CHARACTERS

PAD, EOS = "<pad>", "<eos>"
HEAD_SIZE = 32  # the smallest head size that vLLM's CPU attention supports


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Ids: 0 padding, 1 end of sequence, then CHARACTERS in their order. Any other character is an error."""
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def model_config(layers: int = 4, width: int = 128) -> Qwen2Config:
    """A Qwen2 of 1.06 million parameters by default."""
    return Qwen2Config(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        use_cache=True,
    )


def write_base_model(folder: Path, seed: int, config: Qwen2Config | None = None) -> None:
    """Save an untrained model and its tokenizer as a transformers folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config or model_config())
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
