"""The contents of a checkpoint in a form that two checkpoints can be compared in bit by bit.

The files themselves are not comparable, because safetensors writes its metadata in any order.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, by file and name, and of every other file."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[f"{path.name}: {name}"] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, by name, in a checkpoint that one rank wrote; without the optimizer's moments."""
    (path,) = folder.glob("*.safetensors")
    return {name: tensor for name, tensor in load_file(path).items() if not name.startswith("exp_avg")}
