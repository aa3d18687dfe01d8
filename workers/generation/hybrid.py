"""Generation by the ranks that train, in the layout that the hybrid engine has switched to.

The engine is a `TorchEngine`, to which the shards of a generation replica look like one language model. All ranks of
the replica run it on the same rows. They get the same logits and sample the same tokens, so they exchange only
activations and logits, and their rows are those of a single process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from protocols.data.messages import Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Partial
from protocols.weights import Probe, Version
from workers.data.vocabulary import Vocabulary
from workers.generation.colocated import ColocatedEngine
from workers.generation.engine import generate_all
from workers.generation.in_place import load_in_place
from workers.generation.torch import TorchEngine
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.settings import Generation


class ColocatedTorch(ColocatedEngine):
    """The weights are gathered for generation at each `publish` and freed by `release`; every rank has an engine."""

    def __init__(self, hybrid: HybridEngine, settings: Generation, run_seed: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        module = cast(PreTrainedModel, _Replica(hybrid))  # the part of a transformers module that the engine uses
        self._hybrid = hybrid
        self._new_engine = partial(TorchEngine, module, settings, run_seed, vocabulary, owns_model=False)
        self.engine = self._new_engine()

    @property
    def generating(self) -> bool:
        return bool(self._hybrid.weights)

    def _publish(self, version: Version, probe: Callable[[], Probe]) -> Transition:
        transition = self._hybrid.to_generation()
        load_in_place(self.engine, version)
        return transition

    def generate(self, prompts: Prompts, sampling: Sampling) -> Partial[Rollouts] | None:
        try:
            generated = generate_all(self.engine, prompts, sampling)
        except BaseException:  # the failed call's rows are still queued: the next call must not generate them
            version, self.engine = self.engine.version, self._new_engine()
            if version is not None:
                load_in_place(self.engine, version)
            raise
        return generated if self._hybrid.is_output_rank else None

    def release(self) -> None:
        self._hybrid.to_training()


class _Replica(nn.Module):
    """The ranks of one generation replica as a transformers language model that decodes from a cache."""

    def __init__(self, hybrid: HybridEngine) -> None:
        super().__init__()
        self.config, self.device = hybrid.config, hybrid.device
        self._hybrid = hybrid

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        use_cache: bool,
        logits_to_keep: int,
    ) -> CausalLMOutputWithPast:
        """Logits of the last position, [n, 1, V]. Raises RuntimeError while the ranks train."""
        if not self._hybrid.weights:
            raise RuntimeError("the ranks hold the training layout: switch to generation before an engine steps")
        if not use_cache or logits_to_keep != 1:
            raise ValueError(f"decoding takes the last position from a cache, got {use_cache=}, {logits_to_keep=}")
        logits = self._hybrid.next_logits(input_ids, attention_mask, position_ids, past_key_values)
        return CausalLMOutputWithPast(logits=cast(torch.FloatTensor, logits.unsqueeze(1)))
