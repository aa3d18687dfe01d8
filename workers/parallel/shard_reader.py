"""Reads one rank's shard from a transformers folder, and nothing else of the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from workers.parallel.decoder import laid_out
from workers.parallel.plan import Parameter, ShardPlan

# A rank's shards of the parameters of these names, or of all, as they are stepped; by name, laid out along their cut.
ReadParameters = Callable[[Container[str] | None], dict[str, Tensor]]
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_shard(
    folder: str | Path,
    plan: ShardPlan,
    stage: int,
    tensor_index: int,
    *,
    only: Container[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The parameters of one stage and tensor index by name, each laid out along its cut; with `only`, those it names.

    A value head that the folder lacks is zero, so that the first values are 0. A tied head is read from the embedding.
    Raises ValueError for any other missing tensor, and for a tensor whose shape is not the config's.
    """
    parameters = [p for p in plan.parameters(stage) if only is None or p.name in only]
    sources = {p.name: plan.source(p).name for p in parameters}
    files = _files(Path(folder))
    zeros = {name for name in sources if plan.decoder.head == "value" and name.startswith("score.")} - files.keys()
    missing = sorted(set(sources.values()) - files.keys() - zeros)
    if missing:
        raise ValueError(f"model folder {folder} lacks {len(missing)} of the model's tensors: {missing[:5]}")
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in {*files.values()}}
        tensors: dict[str, Tensor] = {}
        for parameter in parameters:
            source = sources[parameter.name]
            if parameter.name in zeros:
                tensors[parameter.name] = torch.zeros(plan.shard_shape(parameter), dtype=dtype, device=device)
                continue
            part = _part(opened[files[source]].get_slice(source), plan, parameter, tensor_index, folder)
            tensors[parameter.name] = laid_out(part.to(device, dtype, copy=True), parameter)
    return tensors


def _part(stored: Any, plan: ShardPlan, parameter: Parameter, index: int, folder: str | Path) -> Tensor:
    shape = tuple(stored.get_shape())
    if shape != parameter.shape:
        raise ValueError(
            f"model folder {folder}: {parameter.name} has shape {shape}, the config's is {parameter.shape}"
        )
    start, size = plan.shard_start(parameter, index), plan.shard_shape(parameter)
    return stored[tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))]


def _files(folder: Path) -> Mapping[str, Path]:
    """The file of each tensor, by name."""
    if (folder / _INDEX).exists():
        names = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    path = folder / _ONE_FILE
    if not path.exists():
        raise ValueError(f"model folder {folder} has neither {_ONE_FILE} nor {_INDEX}")
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)
