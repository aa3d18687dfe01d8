"""Generating by the ranks that train, in the layout that the hybrid engine has switched to.

The engine is `TorchEngine` itself: to it, the shards of a generation replica look like one language model. All ranks
of the replica run it side by side on the same rows; they see the same logits and draw the same tokens, so nothing
but activations and logits passes between them, and greedy and seeded rows are those of a single process.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from protocols.data.messages import Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Partial
from protocols.weights import Version
from workers.generation.engine import Engine, FinishedRow, submit_rows, to_rollouts
from workers.generation.torch import TorchEngine
from workers.resharding.hybrid_engine import HybridEngine
from workers.settings import Generation


def hybrid_generator(
    hybrid: HybridEngine, settings: Generation, run_seed: int, eos_token_id: int, version: Version
) -> TorchEngine:
    """This rank's engine over a generation replica; `advance` it after an update.

    Its ranks submit the same rows in the same order and step together, between `to_generation` and `to_training`.
    """
    module = cast(PreTrainedModel, _Replica(hybrid))  # of a transformers module the engine uses just this much
    return TorchEngine(module, settings, run_seed, eos_token_id, owns_model=False, version=version)


def draw_all(engine: Engine, prompts: Prompts, sampling: Sampling) -> Partial[Rollouts]:
    """Submit rows and step until all have finished; rollouts in the order of the prompts, and those that don't fit."""
    failures = submit_rows(engine, prompts, sampling)
    finished: dict[int, FinishedRow] = {}
    while engine.unfinished:
        finished |= {row.sample_id: row for row in engine.step()}
    drawn = [finished[sample] for sample in prompts.sample_ids.tolist() if sample in finished]
    return Partial(to_rollouts(prompts, drawn), failures)


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
