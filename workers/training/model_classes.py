"""Which transformers class a model is: a decoder with a token head, or with one number per position.

transformers has classes for sequence classification (a score) and token classification (a value) for some families
only. For the others this module makes the same class of the family's own parts: its body and a linear layer `score`.
Their folders have the names that such a class would give them, and are read again here.
"""

from __future__ import annotations

import copy
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from workers.parallel.plan import Head

HEADS = ("score", "classifier")  # the layer that gives one number per position, as the families call it
_CLASSES: dict[Head, tuple[Any, str]] = {
    "tokens": (MODEL_FOR_CAUSAL_LM_MAPPING, "ForCausalLM"),
    "value": (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, "ForTokenClassification"),
    "score": (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "ForSequenceClassification"),
}


def model_class(config: PretrainedConfig, head: Head) -> type[PreTrainedModel]:
    """The class of a family's model with this head. Raises ValueError for what transformers has no causal model of."""
    known, _ = _CLASSES[head]
    if type(config) in known:
        return known[type(config)]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type {config.model_type!r}: transformers has no causal language model of this family")
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        parts = dict(causal(copy.deepcopy(config)).named_children())
    body = next(name for name, part in parts.items() if isinstance(part, PreTrainedModel))
    return _headed_class(causal, head, body)


def skeleton(config: PretrainedConfig, head: Head) -> PreTrainedModel:
    """transformers' own module for a model, without memory: its tensors' names and order, and a way to write them."""
    config = copy.deepcopy(config)
    if head != "tokens":
        config.num_labels = 1
    with torch.device("meta"):
        return model_class(config, head)(config)


def number_head(model: PreTrainedModel) -> nn.Module:
    """The layer that gives one number per position. Raises ValueError for a model without one."""
    for name in HEADS:
        if isinstance(layer := getattr(model, name, None), nn.Module):
            return layer
    raise ValueError(f"a {type(model).__name__} has no layer named {' or '.join(HEADS)}: want a decoder's model")


class _Headed(PreTrainedModel):
    """A body and a linear layer on every position of it; the rest is the family's own base class."""

    head_bias: bool

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        body = AutoModel.from_config(config)
        setattr(self, self.base_model_prefix, body)
        # What the head of the language model reads: in some families (OPT) narrower than the layers.
        width = body.get_input_embeddings().weight.shape[1]
        self.score = nn.Linear(width, 1, bias=self.head_bias)
        self.post_init()

    def forward(self, **inputs: Any) -> Tensor:
        """One number per position, [n, L, 1]."""
        return self.score(self.base_model(**inputs).last_hidden_state)


@cache
def _headed_class(causal: type[PreTrainedModel], head: Head, body: str) -> type[PreTrainedModel]:
    """`body` is the body's name in the language model, and so in its checkpoint."""
    family = next(base for base in causal.__mro__[1:] if issubclass(base, PreTrainedModel))
    _, suffix = _CLASSES[head]
    name = causal.__name__.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + suffix
    own = {
        # transformers takes a class of another module for custom code, and converts no names for it.
        "__module__": causal.__module__,
        "__doc__": f"{causal.__name__}'s body with a head of one number per position.",
        "base_model_prefix": body,
        "head_bias": head == "value",
    }
    made = type(name, (_Headed, family), own)
    assert name not in vars(sys.modules[causal.__module__]), f"{name}: transformers has this class"
    return made
