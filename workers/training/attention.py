"""Which implementation of attention a model computes with."""

from __future__ import annotations

import logging

from transformers import PretrainedConfig, PreTrainedModel

from workers.settings import Attention

_log = logging.getLogger("asyncflow.models")


def attention_of(kind: type[PreTrainedModel], config: PretrainedConfig, wanted: Attention) -> Attention:
    """The implementation that a family's model takes: `wanted`, or eager, with a line in the log, in the place of sdpa.

    sdpa has no soft cap on its logits, which Gemma 2 wants: transformers leaves the cap out without a word. Raises
    ValueError for a family without flash attention.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if wanted == "flash_attention_2" and not kind._supports_flash_attn:
        raise ValueError(f"attention = 'flash_attention_2': {kind.__name__} does not have it: want 'sdpa' or 'eager'")
    if wanted == "sdpa" and (capped or not kind._supports_sdpa):
        _log.warning("%s: attention is eager: this family does not have sdpa", kind.__name__)
        return "eager"
    return wanted


def reads_mask(config: PretrainedConfig) -> bool:
    """Whether a forward pass of rows that are padded on the right should be given the mask of their padding.

    Causal attention looks at no later token, so a real token never sees padding there. Without a mask sdpa takes its
    fastest kernels, and no query is masked from all keys. Flash attention skips the padding that a mask names.
    """
    return config._attn_implementation == "flash_attention_2"
