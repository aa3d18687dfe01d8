"""Read facts about a model from the files of its transformers folder, without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def end_of_sequence(folder: str | Path) -> int:
    """The end-of-sequence token id of a model folder. Raises ValueError where its files name none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.exists() and (value := json.loads(path.read_text()).get("eos_token_id")) is not None:
            return int(value[0] if isinstance(value, list) else value)
    raise ValueError(f"model folder {folder}: neither generation_config.json nor config.json has an eos_token_id")


def context_of(folder: str | Path) -> int:
    """The model's context length: most tokens of prompt and response. Raises ValueError if its config has none."""
    limit = json.loads((Path(folder) / "config.json").read_text()).get("max_position_embeddings")
    if not isinstance(limit, int):
        raise ValueError(f"model folder {folder}: config.json has no max_position_embeddings")
    return limit


_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")  # a folder's tokenizer, chat template and generation defaults
_OF_THE_WEIGHTS = ("training.json", ".index.json")


def copy_auxiliary_files(source: str | Path, folder: str | Path) -> None:
    """Copy the tokenizer and all other files of a model's folder that do not belong to its weights."""
    for path in Path(source).iterdir():
        if path.suffix in _BESIDE_WEIGHTS and path.name != "config.json" and not path.name.endswith(_OF_THE_WEIGHTS):
            shutil.copyfile(path, Path(folder) / path.name)
