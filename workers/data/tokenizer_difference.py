"""Compares the tokenizers of two folders by what they do: models that exchange ids must read the same text as the same.

White space, the order of keys and of added tokens, stored padding and truncation, and options that change neither ids
nor texts don't count. Where two files split a text by other rules, the rules are tried on texts of the vocabulary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from workers.data.hf_folder import added_tokens_of
from workers.data.tokenizer import Tokenizer

_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}  # their sequences
_PROBES = (  # what rules of splitting treat differently
    "Hello, world!  Two spaces\n\nand lines\tand tabs.",
    " leading, trailing ",
    "I'm, we've, DON'T",
    "x = 1234567.89e-10 // snake_case camelCase",
    "e\u0301 \u00e9 A\u030a \ufb01 \uff11\uff12 \u00a0",
    "\u4e2d\u6587\u3001\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f642",
)
_RANDOM_TEXTS = 2000  # of tokens beside each other


def difference(one: str | Path, other: str | Path) -> str:
    """The first difference between the tokenizers of two folders, in words; "" if they do the same.

    The other may have further special tokens, such as a padding token, that the first has no id for. Raises
    BadTokenizer.
    """
    if _bytes(one) == _bytes(other):
        return ""
    first, second = Tokenizer(one), Tokenizer(other)
    if found := _of_ids(first, second) or _of_start(first, second):
        return found
    ours, theirs = (json.loads(tokenizer.to_json()) for tokenizer in (first, second))
    if (model := _model(ours)) != (other_model := _model(theirs)):
        return f"their models differ: {_unequal(model, other_model)}"
    if _rules(ours, first.vocabulary) == _rules(theirs, first.vocabulary):
        return ""
    return _of_texts(first, second)


def _bytes(folder: str | Path) -> list[bytes]:
    files = (Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json"))
    return [path.read_bytes() if path.exists() else b"" for path in files]


def _of_ids(first: Tokenizer, second: Tokenizer) -> str:
    """The token of the lowest id that differs."""
    ids, others = first.vocabulary, second.vocabulary
    if changed := [(number, token) for token, number in ids.items() if others.get(token) != number]:
        number, token = min(changed)
        there = others.get(token, "none")
        return f"the token {token!r} has id {number} in {first.folder} and {there} in {second.folder}"
    special, used = {token.content for token in added_tokens_of(second.folder) if token.special}, set(ids.values())
    more = [(number, token) for token, number in others.items() if token not in ids]
    if unknown := sorted((number, token) for number, token in more if token not in special or number in used):
        number, token = unknown[0]
        return f"the token {token!r} has id {number} in {second.folder} and none in {first.folder}"
    return ""


def _of_start(first: Tokenizer, second: Tokenizer) -> str:
    if first.start == second.start:
        return ""
    names = [[tokenizer.token_of(number) for number in tokenizer.start] for tokenizer in (first, second)]
    return f"a text begins with {names[0]} in {first.folder} and with {names[1]} in {second.folder}"


def _of_texts(first: Tokenizer, second: Tokenizer) -> str:
    """The first text that has other ids, or that comes back as another text, among those that a tokenizer can write."""
    tokens = first.decode([[number] for number in sorted(first.vocabulary.values())], special=True)
    rng = random.Random(0)
    mixed = ["".join(rng.choices(tokens, k=4)) for _ in range(_RANDOM_TEXTS)]
    added = [f"1 {token.content} 1" for token in added_tokens_of(first.folder)]
    texts = [*_PROBES, *added, *tokens, *mixed]
    encoded = [tokenizer.encode(texts) for tokenizer in (first, second)]
    decoded = [tokenizer.decode(rows, special=True) for tokenizer, rows in zip((first, second), encoded, strict=True)]
    for text, ids, other_ids, back, other_back in zip(texts, *encoded, *decoded, strict=True):
        if text in (back, other_back) and (ids.tolist() != other_ids.tolist() or back != other_back):
            return (
                f"{text!r:.60} has the ids {_short(ids.tolist())} in {first.folder} and {_short(other_ids.tolist())} "
                f"in {second.folder}"
            )
    return ""


def _short(ids: list[int]) -> str:
    return f"{ids}" if len(ids) <= 12 else f"{ids[:12]} ..."


# --- the content of a tokenizer.json


def _model(content: Mapping[str, Any]) -> dict[str, Any]:
    """How a piece of text becomes tokens; the ids are compared elsewhere."""
    model: dict[str, Any] = {key: value or None for key, value in content["model"].items() if key != "vocab"}
    if isinstance(vocabulary := content["model"].get("vocab"), list):  # Unigram: each token with its score
        model["scores"] = vocabulary
    return model


def _rules(content: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, Any]:
    """How a text is split before and joined after the model; of the added tokens the known ones."""
    added = {token["content"]: token for token in content["added_tokens"] if token["content"] in known}
    return {part: _steps(content[part], key) for part, key in _STEPS.items()} | {"added": added}


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, which may stand in one another; a single step is a sequence of one."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[key] for step in _steps(inner, key)]


def _unequal(first: Any, second: Any) -> str:
    """The first unequal entries of two values."""
    if isinstance(first, dict) and isinstance(second, dict):
        ours, theirs = cast(dict[str, Any], first), cast(dict[str, Any], second)
        key = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        return f"{key}: {_unequal(ours.get(key), theirs.get(key))}"
    if isinstance(first, list) and isinstance(second, list):
        pairs = zip([*first, None], [*second, None], strict=False)
        return next(_unequal(one, other) for one, other in pairs if one != other)
    return f"{first!r:.60} and {second!r:.60}"
