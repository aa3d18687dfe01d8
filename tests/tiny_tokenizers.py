"""Small tokenizers of the kinds that models have, as the files of a transformers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from tests import tiny

BOS, BOS_ID = "<bos>", len(tiny.VOCABULARY)
WORDS = ["we", "need", "to", "add", "9", "and", "6"]


def characters(*added: str) -> tokenizers.Tokenizer:
    """The tokenizer of the tiny models, and further special tokens from id `BOS_ID` on."""
    made = tokenizers.Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return made


def with_bos(*, at_start: bool = True) -> tokenizers.Tokenizer:
    """The tokenizer of the tiny models with a BOS token, which its post-processor writes or not; as Llama-3's."""
    made = characters(BOS)
    if at_start:
        template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def byte_level() -> tokenizers.Tokenizer:
    """Bytes and a few merges, as GPT-2's and Llama-3's; an id for each character of `WORDS` and for each word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([tiny.PAD, tiny.EOS, *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in ("Ġneed", "Ġto", "Ġadd", "Ġand"):
        whole = word[0]
        for letter in word[1:]:
            merges.append((whole, letter))
            whole += letter
            vocabulary.setdefault(whole, len(vocabulary))
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (tiny.PAD, tiny.EOS)])
    return made


def metaspace() -> tokenizers.Tokenizer:
    """Words with the space before them, one put before a text as well; as Llama-2's."""
    pieces = [tiny.PAD, tiny.EOS, "▁", *(f"▁{word}" for word in WORDS), *WORDS]
    made = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=tiny.PAD))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (tiny.PAD, tiny.EOS)])
    return made


def save(made: tokenizers.Tokenizer, folder: str | Path, **config: Any) -> Path:
    """Write tokenizer.json and a tokenizer_config.json of these keys into a folder, which may have a model."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tiny.EOS, "pad_token": tiny.PAD}
    (path / "tokenizer_config.json").write_text(json.dumps(named | config))
    return path
