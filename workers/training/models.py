"""Loading transformers models from local folders, and what their outputs mean: log-probs, scores, canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from workers.training.micro_batches import MicroBatch

# What transformers says while it loads (progress bars, a table of the new value head) is for people at a prompt.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AnyDtype = str | torch.dtype  # a name of DTYPES, or the dtype itself


def dtype_of(dtype: AnyDtype) -> torch.dtype:
    """The dtype that a name stands for."""
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def load_causal(path: str | Path, dtype: AnyDtype = "float32") -> PreTrainedModel:
    """A language model from a transformers folder, in eval mode. Raises ValueError where tensors are missing."""
    model, missing = _loaded(AutoModelForCausalLM, path, dtype)
    _refuse_missing(missing, path)
    return model.eval()


def load_reward(path: str | Path, dtype: AnyDtype = "float32", seed: int | None = None) -> PreTrainedModel:
    """A reward or cost model (sequence classification with one label), in eval mode.

    The folder of a language model has no score head: a seed draws one to train, without a seed it is refused with
    ValueError, as is every other missing tensor. A new head's entries have variance 1 / width, so scores start near
    unit size: from a zero or tiny head the body gets hardly any gradient, and the first hundred steps are lost.
    """
    model, missing = _loaded(AutoModelForSequenceClassification, path, dtype, num_labels=1)
    _refuse_missing(missing if seed is None else missing - {"score.weight"}, path)
    if missing and seed is not None:
        head = model.score.weight
        head.data.normal_(std=head.shape[1] ** -0.5, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def load_critic(path: str | Path, dtype: AnyDtype = "float32") -> PreTrainedModel:
    """A value model (token classification with one label), in eval mode.

    A folder without a value head (a policy's) gets a zero one: the first values are 0, not noise. A reward model's
    head is kept where the family names both alike. Raises ValueError where other tensors are missing.
    """
    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    config.num_labels = 1
    config.classifier_dropout = 0.0  # the class drops a tenth of its features by default: values would be noise
    model, missing = _loaded(AutoModelForTokenClassification, path, dtype, config=config)
    if missing:
        heads = ("score", "classifier")  # as the families call it
        head = {n: p for n, p in model.named_parameters() if n.partition(".")[0] in heads}
        _refuse_missing(missing - set(head), path)
        for name in missing:  # a reward model's folder has the weight and lacks the bias only
            nn.init.zeros_(head[name])
    return model.eval()


_LOCAL: dict[str, Any] = {
    "local_files_only": True,
    "use_safetensors": True,
    "trust_remote_code": False,
    "attn_implementation": "eager",
}


def _loaded(kind: Any, path: str | Path, dtype: AnyDtype, **options: Any) -> tuple[Any, set[str]]:
    """The model, and the names of the tensors that its folder lacks."""
    options |= _LOCAL
    model, loading = kind.from_pretrained(str(path), dtype=dtype_of(dtype), output_loading_info=True, **options)
    return model, set(loading["missing_keys"])


def _refuse_missing(names: set[str], path: str | Path) -> None:
    """transformers draws what a folder lacks at random, and says so only in its log: such a model is refused."""
    if names:
        raise ValueError(f"model folder {path} lacks {len(names)} of the model's tensors: {sorted(names)[:5]}")


def response_log_probs(logits: Tensor, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probs of the response tokens, [sum of T_i], from the logits of the whole rows, [n, L, V]."""
    return log_softmax_of(batch.before_response(logits), batch.response_tokens(), temperature)


def log_softmax_of(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token] in float32; temperature 0 (greedy) reads as 1.

    Float64 logits stay float64.
    """
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / (temperature or 1.0)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def sequence_scores(outputs: Tensor, batch: MicroBatch) -> Tensor:
    """Scores of whole rows, float32 [n], from a reward model's outputs at every position, [n, L, 1]."""
    return batch.at_end(outputs).squeeze(-1).float()


def canonical_tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The tensors of the model's checkpoint under their checkpoint names; a tied tensor stands once."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach()
    return tensors
