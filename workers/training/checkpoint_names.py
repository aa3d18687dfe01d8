"""The names under which a folder, and so vLLM's loaders, have the tensors that transformers keeps otherwise in memory.

transformers fuses the experts of a mixture into one tensor (`mlp.experts.gate_up_proj`), where a checkpoint has a
matrix per expert (`mlp.experts.0.gate_proj.weight`), and calls some tensors differently. Its own conversions say how;
`save_pretrained` applies them backwards. Weights are published under the names of the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


class CheckpointNames:
    """The conversions of a model's family; most families have none.

    A folder's own peculiarities (an old name of a tensor, a missing prefix) are no part of it: the names are those of
    a folder that transformers writes anew.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` may be without memory."""
        found = get_model_conversion_mapping(model, add_legacy=False)
        self._model = model
        self._forward: list[Any] = [step for step in found if not isinstance(step, PrefixChange)]

    def to_checkpoint(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in memory -> by their names in a checkpoint. Some are views, divided ones copies."""
        backward = [step.reverse_transform() for step in reversed(self._forward)]
        return dict(self._converted(backward, tensors.items(), reverse=True))

    def to_memory(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The inverse. Without conversions the tensors pass one by one; else all of them are held until the end."""
        return self._converted(self._forward, tensors, reverse=False)

    def _converted(
        self, steps: list[Any], tensors: Iterable[tuple[str, Tensor]], *, reverse: bool
    ) -> Iterator[tuple[str, Tensor]]:
        if not steps:
            yield from tensors
            return
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
        pending: dict[str, Any] = {}  # by the first name that each gives
        for name, tensor in sorted(tensors, key=lambda item: dot_natural_key(item[0])):  # expert 10 after expert 9
            target, pattern = rename_source_key(name, renamings, converters, reverse=reverse)
            fresh = copy.deepcopy(by_pattern[pattern]) if pattern is not None else WeightRenaming(name, target)
            pending.setdefault(target, fresh).add_tensor(target, name, pattern or name, tensor)
        for target, step in pending.items():
            converted = step.convert(target, model=self._model, config=self._model.config)
            for name, value in converted.items():
                yield name, value[0] if isinstance(value, list) else value
