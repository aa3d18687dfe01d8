"""Checks the folders of a recipe's models: their config, their family, and the tensors that their files hold.

Only headers are read, so a recipe is checked in milliseconds, or in seconds for a family that only transformers knows;
what these checks pass, a service can load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from asyncflow.recipe.config import BadInput
from asyncflow.services.ranks.role_specs import ROLE_SPECS
from workers.data.folder_tensors import BadFolder, StoredTensor, refuse_pointers, stored_tensors
from workers.data.hf_folder import config_in
from workers.families import not_trainable
from workers.parallel.plan import Decoder, Head, ShardPlan, has_plan

_FLOATS = ("F16", "BF16", "F32", "F64")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_TOKEN_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_SCORE = "score.weight"


def config_of(role: str, folder: str) -> dict[str, Any]:
    """Read config.json of a role's transformers folder. Raises BadInput if it is missing or unreadable."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise BadInput(f"models.{role}.path: no folder {folder}")
    if not path.exists():
        raise BadInput(f"models.{role}.path: {folder} is no transformers folder, it has no config.json")
    try:
        refuse_pointers(folder)
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except BadFolder as error:
        raise BadInput(f"models.{role}.path: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadInput(f"models.{role}.path: {path}: {error}") from error


def check_folder(role: str, folder: str) -> None:
    """Check that a folder's files hold a model for a role, or for a part of a mix. Raises BadInput."""
    config_of(role, folder)
    if reason := unusable_folder(folder, ROLE_SPECS[role.partition(".")[0]].head):
        raise BadInput(f"models.{role}.path: {reason}")


def unusable_folder(folder: str, head: Head) -> str:
    """Why a folder, which has a config.json, is not one of a model with this head; "" if it is."""
    try:
        tensors, config = stored_tensors(folder), config_in(folder)
    except ValueError as error:
        return str(error)
    reason = not_trainable(config) or unfit_tensors(tensors, config, head)
    if not reason and not has_plan(config):
        reason = _unfit_to_load(folder, head)
    return f"{folder}: {reason}" if reason else ""


def unfit_tensors(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], head: Head) -> str:
    """Why these tensors are not those of a model of this config with this head, and what to do; "" if they are.

    A critic may start from any folder of its family: its head is then new.
    """
    if odd := sorted({t.dtype for t in tensors.values() if t.dtype.startswith(("F4", "F6", "F8"))} - set(_FLOATS)):
        return f"its tensors are {odd[0]}, which can't be trained: take a folder in bfloat16 or float32"
    if reason := _unfit_head(tensors, head):
        return reason
    if has_plan(config):
        return _unfit_shapes(tensors, config, head)
    rows, name = config.get("vocab_size"), next((n for n in tensors if n.endswith(_EMBEDDINGS)), "")
    if rows and name and tensors[name].shape[0] != rows:
        return f"{name} has {tensors[name].shape[0]} rows, its config.json says vocab_size = {rows}"
    return _missing_layer(tensors, config)


def _unfit_head(tensors: Mapping[str, StoredTensor], head: Head) -> str:
    score = tensors.get(_SCORE)
    if head == "score" and score is None:
        return (
            f"it has no {_SCORE}, so it is no reward or cost model: train one with `asyncflow reward-model`, or give "
            "a rule"
        )
    if head == "score" and score is not None and score.shape[0] != 1:
        return f"{_SCORE} has {score.shape[0]} labels: a reward or cost model has one"
    if head == "tokens" and score is not None and not any(name.endswith(_TOKEN_HEADS) for name in tensors):
        return f"it has {_SCORE} in the place of a token head, so it is a reward model: give a language model"
    return ""


def _unfit_shapes(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], head: Head) -> str:
    """Compare with every tensor that a family with a sharding plan has."""
    plan = ShardPlan(Decoder.of(config, head))
    wanted = {plan.source(spec).name: spec.shape for spec in plan.parameters(0)}
    new = {name for name in wanted if head == "value" and name.startswith("score.")}
    # Folders of a bare body have no prefix: transformers adds it.
    named = {n if n in wanted else f"model.{n}": t for n, t in tensors.items()}
    if missing := sorted(wanted.keys() - named.keys() - new):
        return f"it lacks {len(missing)} of the model's tensors, first {missing[0]}: download the folder again"
    for name, shape in wanted.items():
        if name in named and named[name].shape != shape:
            return (
                f"{name} has shape {list(named[name].shape)}, by its config.json {list(shape)}: config.json and "
                "weights are of different models"
            )
    return ""


def _unfit_to_load(folder: str, head: Head) -> str:
    """Have transformers compare the folder with the model of a family whose tensors only it knows."""
    from workers.training.models import lacking  # torch: seconds that most recipes do without

    try:
        missing = lacking(folder, head)
    except (ValueError, RuntimeError) as error:
        return f"transformers can't load it: {' '.join(str(error).split())[:300]}"
    if missing:
        return f"it lacks {len(missing)} of the model's tensors, first {missing[0]}: download the folder again"
    return ""


def _missing_layer(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> str:
    """The first layer of which there is no tensor at all."""
    layers = next((n for key in ("num_hidden_layers", "n_layer", "num_layers") if (n := config.get(key))), 0)
    found = {int(part) for name in tensors for part in name.split(".")[:5] if part.isdigit()}
    if missing := sorted(set(range(int(layers))) - found):
        return f"it lacks all tensors of layer {missing[0]} of {layers}: download the folder again"
    return ""
