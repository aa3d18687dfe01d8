"""The head of a transformers language model by itself: from the body's activations to logits.

A family may do more to logits than one product: a soft cap (Gemma 2), a factor (Cohere, Granite). So the head is the
family's own forward pass, of a copy of the model whose body returns the activations that it is given. The copy shares
all parameters, adapters included. Whether it computes what the model does is tried once, when the model is loaded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ODD = (ArithmeticError, AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError)


class TokenHead:
    """Activations [m, H] -> logits [m, V]; `find` makes one."""

    def __init__(self, model: PreTrainedModel, outputs: type) -> None:
        """`outputs` is the class of what the model's body returns."""
        self._model: Any = copy.copy(model)
        self._model._modules = {**model._modules, model.base_model_prefix: _Given(outputs)}

    def __call__(self, states: Tensor) -> Tensor:
        return self._model(inputs_embeds=states.unsqueeze(0), use_cache=False).logits.squeeze(0)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that it reads."""
        return list(self._model.parameters())

    @classmethod
    @torch.no_grad()
    def find(cls, model: PreTrainedModel) -> TokenHead | None:
        """The head of a model whose weights are there; None for a model that can't be divided this way."""
        inputs: dict[str, Any] = {"input_ids": torch.arange(1, 4, device=model.device)[None], "use_cache": False}
        whole, body = model(**inputs).logits, model.base_model(**inputs)
        try:
            head = cls(model, type(body))
            logits = head(body.last_hidden_state[0])
        except _ODD:  # whatever a family's forward pass raises where its body is another one
            return None
        return head if logits.shape == whole[0].shape and torch.allclose(logits, whole[0], 1e-5, 1e-5) else None


class _Given(nn.Module):
    """A body whose last activations are the embeddings that it is given."""

    def __init__(self, outputs: type) -> None:
        super().__init__()
        self._outputs = outputs

    @property
    def decoder(self) -> _Given:
        """The part of the body that some families (OPT) call."""
        return self

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> Any:
        return self._outputs(last_hidden_state=inputs_embeds)
