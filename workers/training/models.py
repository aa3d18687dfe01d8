"""Loading transformers models from local folders, and what their outputs mean: log-probs, scores, canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from workers.parallel.plan import Head
from workers.settings import Attention
from workers.training.attention import attention_of
from workers.training.checkpoint_names import CheckpointNames
from workers.training.micro_batches import MicroBatch
from workers.training.model_classes import HEADS, model_class, number_head
from workers.training.outputs import Outputs

# What transformers says while it loads (progress bars, a table of the new value head) is for people at a prompt.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOCAL_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # how every folder is read
AnyDtype = str | torch.dtype  # a name of DTYPES, or the dtype itself


def dtype_of(dtype: AnyDtype) -> torch.dtype:
    """The dtype that a name stands for."""
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def load_causal(path: str | Path, dtype: AnyDtype = "float32", attention: Attention = "sdpa") -> PreTrainedModel:
    """A language model from a transformers folder, in eval mode. Raises ValueError where tensors are missing."""
    model, missing = _loaded(path, "tokens", dtype, attention)
    _refuse_missing(missing, path)
    return model.eval()


def load_reward(
    path: str | Path, dtype: AnyDtype = "float32", seed: int | None = None, attention: Attention = "sdpa"
) -> PreTrainedModel:
    """A reward or cost model (sequence classification with one label), in eval mode.

    The folder of a language model has no score head: a seed draws one to train, without a seed it is refused with
    ValueError, as is every other missing tensor. A new head's entries have variance 1 / width, so scores start near
    unit size: from a zero or tiny head the body gets hardly any gradient, and the first hundred steps are lost.
    """
    model, missing = _loaded(path, "score", dtype, attention)
    _refuse_missing(missing if seed is None else missing - _head_names(model), path)
    if missing and seed is not None:
        head = number_head(model).get_parameter("weight")
        head.data.normal_(std=head.shape[1] ** -0.5, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def load_critic(path: str | Path, dtype: AnyDtype = "float32", attention: Attention = "sdpa") -> PreTrainedModel:
    """A value model (token classification with one label), in eval mode.

    A folder without a value head (a policy's) gets a zero one: the first values are 0, not noise. A reward model's
    head is kept where the family names both alike. Raises ValueError where other tensors are missing.
    """
    model, missing = _loaded(path, "value", dtype, attention)
    _refuse_missing(missing - _head_names(model), path)
    for name in missing:  # a reward model's folder has the weight and lacks the bias only
        nn.init.zeros_(model.get_parameter(name))
    return model.eval()


def lacking(path: str | Path, head: Head) -> list[str]:
    """The tensors that a folder lacks for a model with this head, by their names in memory; no weights are read.

    Finds none where the package accelerate is not installed. Raises ValueError for a family without such a head, and
    RuntimeError for tensors whose shapes are not those of config.json.
    """
    if find_spec("accelerate") is None:
        return []
    model, missing = _loaded(path, head, "float32", "eager", {"": "meta"})
    return sorted(missing - _head_names(model) if head == "value" else missing)


def _loaded(
    path: str | Path, head: Head, dtype: AnyDtype, attention: Attention, device_map: dict[str, str] | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of the tensors that its folder lacks. Raises ValueError for a family without it."""
    config = AutoConfig.from_pretrained(str(path), **LOCAL_ONLY)
    if head != "tokens":
        config.num_labels = 1
    kind: Any = model_class(config, head)
    model, loading = kind.from_pretrained(
        str(path), config=config, dtype=dtype_of(dtype), output_loading_info=True, use_safetensors=True,
        attn_implementation=attention_of(kind, config, attention), device_map=device_map,
        **LOCAL_ONLY,
    )  # fmt: skip
    if head != "tokens":
        number_head(model)
    return model, set(loading["missing_keys"])


def _head_names(model: PreTrainedModel) -> set[str]:
    """The names of the head's tensors that gives one number per position."""
    return {name for name, _ in model.named_parameters() if name.partition(".")[0] in HEADS}


def _refuse_missing(names: set[str], path: str | Path) -> None:
    """transformers draws what a folder lacks at random, and says so only in its log: such a model is refused."""
    if names:
        raise ValueError(f"model folder {path} lacks {len(names)} of the model's tensors: {sorted(names)[:5]}")


def response_log_probs(outputs: Outputs, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probs of the response tokens, [sum of T_i]."""
    (found,) = outputs.of_responses(batch, lambda logits, tokens, _: (log_softmax_of(logits, tokens, temperature),))
    return found


def log_softmax_of(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token] in float32; temperature 0 (greedy) reads as 1.

    Float64 logits stay float64.
    """
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    if temperature not in (0.0, 1.0):  # which would copy them for nothing
        scaled = scaled / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def sequence_scores(outputs: Outputs, batch: MicroBatch) -> Tensor:
    """Scores of whole rows, float32 [n], of a reward model."""
    return outputs.at_end(batch).squeeze(-1).float()


def tensors_in_memory(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers, by transformers' names; a tied tensor stands once."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach()
    return tensors


def canonical_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of `canonical_tensors`."""
    own = {name: tensor.to("meta") for name, tensor in tensors_in_memory(model).items()}
    return {name: tuple(t.shape) for name, t in CheckpointNames(model).to_checkpoint(own).items()}


def canonical_tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The tensors of the model's checkpoint under their checkpoint names; a tied tensor stands once.

    They are the model's own tensors, except those that a checkpoint divides otherwise, which are copies.
    """
    return CheckpointNames(model).to_checkpoint(tensors_in_memory(model))
