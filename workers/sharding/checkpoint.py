"""A checkpoint in shards: each rank writes what it alone holds, and any other topology reads just what it needs.

    shard-S-T.safetensors   of stage S and tensor index T, by checkpoint name; under a prefix, a tensor's companions
                            (an optimizer's moments), which have its shape and are cut like it

What several ranks hold is written once: by tensor index 0, and a tied matrix by the first stage. The reader needs the
plan that wrote, from which it knows which file holds which part of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.sharding.decoder import laid_out
from workers.sharding.plan import EMBEDDING, TOKEN_HEAD, Parameter, ShardPlan


class Part(NamedTuple):
    """A range of one tensor shard, along the dimension that is cut."""

    shard: int  # tensor index
    start: int
    stop: int


def parts(size: int, have: int, want: int, index: int) -> list[Part]:
    """What part `index` of `want` equal ones consists of, where `size` entries lie in `have` equal parts."""
    held, needed = size // have, size // want
    start, stop = index * needed, (index + 1) * needed
    return [
        Part(i, max(start - i * held, 0), min(stop - i * held, held)) for i in range(start // held, -(-stop // held))
    ]


def written_by(plan: ShardPlan, stage: int, tensor_index: int) -> list[Parameter]:
    """The parameters that one place writes."""
    return [
        parameter
        for parameter in plan.parameters(stage)
        if (parameter.cut is not None or tensor_index == 0) and not _is_copy(parameter, plan)
    ]


def write_shard(
    folder: str | Path, plan: ShardPlan, stage: int, tensor_index: int, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write one place's file. `tensors` are by prefix ("" for the weights themselves), then by parameter name."""
    held = [parameter.name for parameter in written_by(plan, stage, tensor_index)]
    entries = {
        prefix + name: named[name].detach().contiguous().cpu() for prefix, named in tensors.items() for name in held
    }
    save_file(entries, _file(Path(folder), stage, tensor_index))


def read_parts(
    folder: str | Path,
    written: ShardPlan,
    plan: ShardPlan,
    stage: int,
    tensor_index: int,
    prefixes: Sequence[str],
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Tensor]]:
    """What one place of `plan` holds, by prefix and name, from the files that `written` wrote; only its slices.

    Tensors are laid out along their cut, in the dtype that was written. Raises ValueError naming the file where one is
    missing or damaged, or holds other names or shapes than the decoder's.
    """
    with ExitStack() as stack:
        files = _Files(Path(folder), written, prefixes, stack)
        return {
            prefix: {
                parameter.name: laid_out(files.read(prefix, parameter, plan, tensor_index).to(device), parameter)
                for parameter in plan.parameters(stage)
            }
            for prefix in prefixes
        }


class _Files:
    """The files of a checkpoint, each opened and checked when it is first read."""

    def __init__(self, folder: Path, written: ShardPlan, prefixes: Iterable[str], stack: ExitStack) -> None:
        self._folder, self._written, self._prefixes, self._stack = folder, written, tuple(prefixes), stack
        self._opened: dict[tuple[int, int], Any] = {}

    def read(self, prefix: str, parameter: Parameter, plan: ShardPlan, tensor_index: int) -> Tensor:
        source = _source(parameter, self._written)
        stage, cut = self._written.stage_of(source), source.cut
        if cut is None:
            return self._slice(stage, 0, prefix, source)[:]
        needed = parts(source.shape[cut], self._written.tp, plan.tp, tensor_index)
        read: list[Tensor] = []
        for part in needed:
            along, stored = slice(part.start, part.stop), self._slice(stage, part.shard, prefix, source)
            read.append(stored[along] if cut == 0 else stored[:, along])
        return torch.cat(read, cut) if len(read) > 1 else read[0]

    def _slice(self, stage: int, tensor_index: int, prefix: str, parameter: Parameter) -> Any:
        path = _file(self._folder, stage, tensor_index)
        stored = self._file(stage, tensor_index, path).get_slice(prefix + parameter.name)
        shape, expected = tuple(stored.get_shape()), self._written.shard_shape(parameter)
        if shape != expected:
            raise ValueError(f"{path}: {prefix}{parameter.name} has shape {shape}, the model's is {expected}")
        return stored

    def _file(self, stage: int, tensor_index: int, path: Path) -> Any:
        if (stage, tensor_index) not in self._opened:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: this part of the checkpoint can't be read: {error}") from error
            expected = {
                p + held.name for p in self._prefixes for held in written_by(self._written, stage, tensor_index)
            }
            if odd := sorted(expected ^ set(file.keys())):
                raise ValueError(f"{path}: tensors differ from the model's: {odd[:5]}")
            self._opened[stage, tensor_index] = file
        return self._opened[stage, tensor_index]


def _is_copy(parameter: Parameter, plan: ShardPlan) -> bool:
    return parameter.name == TOKEN_HEAD and plan.decoder.tied


def _source(parameter: Parameter, written: ShardPlan) -> Parameter:
    """Where a parameter's values are: a tied head's are its embedding's."""
    if not _is_copy(parameter, written):
        return parameter
    return next(p for p in written.before_layers(0) if p.name == EMBEDDING)


def _file(folder: Path, stage: int, tensor_index: int) -> Path:
    return folder / f"shard-{stage}-{tensor_index}.safetensors"
