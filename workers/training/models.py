"""transformers models by path, and the two forwards that every role needs: token log-probs and token values.

Rows are right-padded inside a micro-batch and cut by a budget of padded tokens. The cut depends on the rows
and the budget alone, never on which process runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
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

from protocols.data.columns import Jagged

# What transformers says while it loads (progress bars, a table of the new value head) is for people at a prompt.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sequences(Protocol):
    """Any message with prompts and responses."""

    @property
    def prompts(self) -> Jagged: ...
    @property
    def responses(self) -> Jagged: ...


def load_causal(path: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """A language model from a transformers folder, in eval mode. Raises ValueError where tensors are missing."""
    return _load(AutoModelForCausalLM, path, dtype)


def load_reward(path: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """A reward or cost model (sequence classification with one label), in eval mode.

    Raises ValueError where tensors are missing: a language model's folder has no score head.
    """
    return _load(AutoModelForSequenceClassification, path, dtype, num_labels=1)


def load_untrained_reward(path: str | Path, dtype: str, seed: int) -> PreTrainedModel:
    """A reward model to train: a language model gets a score head drawn from the seed, a reward model keeps its own.

    A fresh head's entries have variance 1 / width, so scores start near unit size: from a zero or tiny head the
    body gets hardly any gradient, and the first hundred steps are lost.
    """
    model, missing = _loaded(AutoModelForSequenceClassification, path, dtype, num_labels=1)
    _refuse_missing(missing - {"score.weight"}, path)
    if missing:
        head = model.score.weight
        head.data.normal_(std=head.shape[1] ** -0.5, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def load_critic(path: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """A value model (token classification with one label), in eval mode.

    A folder without a value head (a policy's) gets a zero one: the first values are 0, not noise. A reward model's
    head is kept. Raises ValueError where other tensors are missing.
    """
    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    config.num_labels = 1
    config.classifier_dropout = 0.0  # the class drops a tenth of its features by default: values would be noise
    model, missing = _loaded(AutoModelForTokenClassification, path, dtype, config=config)
    if missing:
        head = {f"score.{name}": parameter for name, parameter in model.score.named_parameters()}
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


def _load(kind: Any, path: str | Path, dtype: str, **options: Any) -> PreTrainedModel:
    model, missing = _loaded(kind, path, dtype, **options)
    _refuse_missing(missing, path)
    return model.eval()


def _loaded(kind: Any, path: str | Path, dtype: str, **options: Any) -> tuple[Any, set[str]]:
    """The model, and the names of the tensors that its folder lacks."""
    model, loading = kind.from_pretrained(str(path), dtype=DTYPES[dtype], output_loading_info=True, **options, **_LOCAL)
    return model, set(loading["missing_keys"])


def _refuse_missing(names: set[str], path: str | Path) -> None:
    """transformers draws what a folder lacks at random, and says so only in its log: such a model is refused."""
    if names:
        raise ValueError(f"model folder {path} lacks {len(names)} of the model's tensors: {sorted(names)[:5]}")


class MicroBatch:
    """Some rows of a batch, right-padded: tokens and mask [n, L] where L is the longest prompt + response."""

    __slots__ = ("lengths", "mask", "prompt_lengths", "response_lengths", "rows", "tokens")

    def __init__(self, data: Sequences, rows: npt.NDArray[np.int64]) -> None:
        self.rows = rows
        self.prompt_lengths = data.prompts.lengths[rows]
        self.response_lengths = data.responses.lengths[rows]
        self.lengths = self.prompt_lengths + self.response_lengths
        width = int(self.lengths.max())
        tokens = np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            tokens[i, : self.prompt_lengths[i]] = data.prompts[row]
            tokens[i, self.prompt_lengths[i] : self.lengths[i]] = data.responses[row]
        self.tokens = torch.from_numpy(tokens)
        self.mask = torch.from_numpy((np.arange(width) < self.lengths[:, None]).astype(np.int64))

    def before_response(self, outputs: Tensor) -> Tensor:
        """[n, L, ...] -> [sum of T_i, ...]: the outputs at the position before each response token, row by row."""
        row = np.repeat(np.arange(len(self.rows)), self.response_lengths)
        return outputs[torch.from_numpy(row), torch.from_numpy(self._positions() - 1)]

    def response_tokens(self) -> Tensor:
        """Token ids of all responses, row by row: int64 [sum of T_i]."""
        row = np.repeat(np.arange(len(self.rows)), self.response_lengths)
        return self.tokens[torch.from_numpy(row), torch.from_numpy(self._positions())]

    def _positions(self) -> npt.NDArray[np.int64]:
        ends = np.cumsum(self.response_lengths)
        if bool((self.prompt_lengths[self.response_lengths > 0] == 0).any()):
            row = int(self.rows[np.flatnonzero((self.prompt_lengths == 0) & (self.response_lengths > 0))[0]])
            raise ValueError(f"row {row} has an empty prompt: nothing stands before its first response token")
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(
            ends - self.response_lengths, self.response_lengths
        )
        return within + np.repeat(self.prompt_lengths, self.response_lengths)

    def column(self, column: Jagged) -> Tensor:
        """The values of a per-response-token column for these rows: [sum of T_i]. A copy, safe to write to."""
        return torch.from_numpy(np.array(column.take(self.rows).values))


def micro_batches(data: Sequences, budget: int) -> Iterator[MicroBatch]:
    """Cut rows, in their order, so that rows x longest stays within `budget` padded tokens (one row at least)."""
    lengths = data.prompts.lengths + data.responses.lengths
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, int(length))
        if row > start and longest * (row + 1 - start) > budget:
            yield MicroBatch(data, np.arange(start, row))
            start, longest = row, int(length)
    if start < len(lengths):
        yield MicroBatch(data, np.arange(start, len(lengths)))


def token_log_probs(model: nn.Module, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probs of the response tokens, float32 [sum of T_i], at the temperature they were drawn with."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    return log_softmax_of(batch.before_response(logits), batch.response_tokens(), temperature)


def log_softmax_of(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token] in float32; temperature 0 (greedy) reads as 1.

    Float64 logits stay float64.
    """
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / (temperature or 1.0)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def token_values(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Values of the states before each response token, float32 [sum of T_i]."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits
    return batch.before_response(logits).float().squeeze(-1)


def sequence_scores(model: Any, batch: MicroBatch) -> Tensor:
    """A reward model's score at the last token of each row, float32 [n]."""
    hidden = model.base_model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(batch.rows)), torch.from_numpy(batch.lengths - 1)]
    return model.score(last).float().squeeze(-1)


@torch.no_grad()
def per_response(data: Sequences, budget: int, forward: Any) -> Jagged:
    """Run a token forward over all rows without gradient: float32 jagged like the responses."""
    parts = [forward(batch).numpy() for batch in micro_batches(data, budget)]
    values = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return data.responses.with_values(values.astype(np.float32, copy=False))


def canonical_tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The tensors of the model's checkpoint under their checkpoint names; a tied tensor stands once."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach()
    return tensors
