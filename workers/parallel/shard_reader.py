"""Reading one rank's shard from a transformers folder: only its slices leave the files."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from workers.parallel.decoder import laid_out
from workers.parallel.plan import EMBEDDING, TOKEN_HEAD, Parameter, ShardPlan

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
    """The parameters of one place, by name, each laid out along its cut; those named `only`, where that is given.

    A value head that the folder lacks is zero, so that the first values are 0; a tied head is read from the
    embedding. Raises ValueError for any other missing tensor, and for one whose shape is not the config's.
    """
    parameters = [p for p in plan.parameters(stage) if only is None or p.name in only]
    tied = plan.decoder.tied
    sources = {p.name: EMBEDDING if tied and p.name == TOKEN_HEAD else p.name for p in parameters}
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
    if parameter.cut is None:
        return stored[:]
    size = plan.shard_shape(parameter)[parameter.cut]
    place = slice(index * size, (index + 1) * size)
    return stored[place] if parameter.cut == 0 else stored[:, place]


def _files(folder: Path) -> Mapping[str, Path]:
    """Which file holds each tensor."""
    if (folder / _INDEX).exists():
        names = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    path = folder / _ONE_FILE
    if not path.exists():
        raise ValueError(f"model folder {folder} has neither {_ONE_FILE} nor {_INDEX}")
    return dict(_names(path))


def _names(path: Path) -> Iterator[tuple[str, Path]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, path
