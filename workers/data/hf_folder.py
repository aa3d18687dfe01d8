"""Read facts about a model from the files of its transformers folder, without torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from workers.data.model_config import UNBOUNDED_CONTEXT, context_in
from workers.settings import Generation


def end_tokens_of(folder: str | Path) -> frozenset[int]:
    """The ids of the tokens that end a response: those of `eos_token_of`, of which there may be several.

    They are eos_token_id of generation_config.json and of config.json, a number or a list, and the tokenizer's eos
    token. Llama-3 has three, and its turns end with the last one. Raises ValueError where the files name none.
    """
    named = [*_named_end_tokens(folder), *_tokenizer_eos(folder)]
    if not named:
        raise ValueError(
            f"model folder {folder}: no eos_token_id in generation_config.json or config.json, and no eos_token in "
            "tokenizer_config.json: name the tokens that end a response"
        )
    return frozenset(named)


def eos_token_of(folder: str | Path) -> int:
    """The id of the token that ends a text: the tokenizer's eos token, or else the first of `end_tokens_of`.

    Raises ValueError where the folder's files name none.
    """
    named = [*_tokenizer_eos(folder), *_named_end_tokens(folder)]
    return named[0] if named else min(end_tokens_of(folder))


def add_end_token(folder: str | Path, token: int) -> None:
    """Name one more token that ends a response in generation_config.json; no change where it is among them already."""
    if token not in end_tokens_of(folder):
        path = Path(folder) / "generation_config.json"
        named = list(dict.fromkeys([*_named_end_tokens(folder), token]))
        path.write_text(json.dumps(json_of(path) | {"eos_token_id": named}, indent=2) + "\n", "utf-8")


def _named_end_tokens(folder: str | Path) -> list[int]:
    """eos_token_id of the model's files, those of generation_config.json first."""
    ends: list[int] = []
    config = json_of(Path(folder) / "config.json")
    for settings in (json_of(Path(folder) / "generation_config.json"), config, config.get("text_config") or {}):
        named = settings.get("eos_token_id")
        ends += named if isinstance(named, list) else [] if named is None else [named]
    return ends


def _tokenizer_eos(folder: str | Path) -> list[int]:
    """The id of the tokenizer's eos token; empty where it has none."""
    token, path = special_tokens_of(folder).get("eos_token"), Path(folder) / "tokenizer.json"
    if token is None or not path.exists():
        return []
    if added := [known.id for known in added_tokens_of(folder) if known.content == token]:
        return added
    vocabulary = json_of(path).get("model", {}).get("vocab")  # the rare case, and the slow one
    number = vocabulary.get(token) if isinstance(vocabulary, dict) else None
    return [] if number is None else [number]


class AddedToken(msgspec.Struct, frozen=True):
    """A token that stands beside the vocabulary of a tokenizer.json and is found before anything else in a text."""

    id: int
    content: str
    special: bool = False  # it is left out where ids are decoded as plain text


class _AddedTokens(msgspec.Struct):
    """The only part of a tokenizer.json that is decoded: its vocabulary may have megabytes."""

    added_tokens: list[AddedToken] = []


def added_tokens_of(folder: str | Path) -> list[AddedToken]:
    """The added tokens of a folder's tokenizer.json; empty where it has none. Raises ValueError for what is no JSON."""
    path = Path(folder) / "tokenizer.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=_AddedTokens).added_tokens if path.exists() else []
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def special_tokens_of(folder: str | Path) -> dict[str, str]:
    """The texts of the tokenizer's special tokens by name ("bos_token", "eos_token", ...), as its files give them."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter is the newer form
        named |= {key: value for key, value in json_of(Path(folder) / name).items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. Raises ValueError, naming it, for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else {}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_in(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    return json.loads((Path(folder) / "config.json").read_text())


def engine_context(folder: str | Path, settings: Generation) -> int:
    """The most tokens of prompt and response that an engine with these settings takes."""
    return settings.max_model_tokens or context_in(config_in(folder)) or UNBOUNDED_CONTEXT


def vocabulary_of(folder: str | Path) -> int | None:
    """The number of ids that a folder's model has an embedding for; None where it has no config that says so."""
    return vocabulary_in(json_of(Path(folder) / "config.json"))


def vocabulary_in(config: Mapping[str, Any]) -> int | None:
    """The number of ids that a config.json names, also in its text_config; None where it names none."""
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


# A folder's tokenizer, its chat template and its generation defaults.
_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
CHAT_TEMPLATES = "additional_chat_templates"  # the subfolder of those that have names
_OF_THE_WEIGHTS = ("training.json", ".index.json")


def copy_auxiliary_files(source: str | Path, folder: str | Path) -> None:
    """Copy the tokenizer and all other files of a model's folder that do not belong to its weights."""
    for path in Path(source).iterdir():
        if path.suffix in _BESIDE_WEIGHTS and path.name != "config.json" and not path.name.endswith(_OF_THE_WEIGHTS):
            shutil.copyfile(path, Path(folder) / path.name)
    if (templates := Path(source) / CHAT_TEMPLATES).is_dir():
        shutil.copytree(templates, Path(folder) / CHAT_TEMPLATES, dirs_exist_ok=True)
