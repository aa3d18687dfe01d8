"""Messages: one type per stage of a sample, and the invalid contents that each refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.data.columns import Batch, columns_of
from protocols.data.jagged import Jagged
from protocols.data.messages import SCHEMAS, Experience, Finish, Metrics, Prompts, Rollouts
from tests.protocols.strategies import batches, messages

KINDS = [pytest.param(kind, id=kind.__name__) for kind in SCHEMAS.values()]


def ragged(*rows: list[float], dtype: str = "int32") -> Jagged:
    return Jagged.from_rows(rows, dtype)


def prompts(**changes: Any) -> Prompts:
    columns: dict[str, Any] = {
        "sample_ids": np.array([1, 2]),
        "prompts": ragged([5, 6], [7]),
        "references": Jagged.from_texts(["42", ""]),
        "min_versions": np.array([0, 3]),
    }
    return Prompts(**columns | changes)


def rollouts(**changes: Any) -> Rollouts:
    columns: dict[str, Any] = {
        "sample_ids": np.array([1, 2]),
        "prompts": ragged([5, 6], [7]),
        "references": Jagged.from_texts(["42", ""]),
        "responses": ragged([8, 9], [1]),
        "log_probs": ragged([-0.5, -1], [-2], dtype="float32"),
        "versions": ragged([0, 1], [1]),
        "loss_mask": ragged([1, 1], [0], dtype="uint8"),
        "finishes": np.array([Finish.STOP, Finish.LENGTH], np.uint8),
    }
    return Rollouts(**columns | changes)


def test_schemas_are_found_by_their_id():
    assert {schema: kind.__name__ for schema, kind in SCHEMAS.items()} == {
        1: "Prompts",
        2: "Rollouts",
        3: "LogProbs",
        4: "Values",
        5: "Scores",
        6: "Costs",
        7: "Experience",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_declared_of_columns_names_columns(kind: type[Batch]):
    names = {column.name for column in columns_of(kind)}
    jagged = {column.name for column in columns_of(kind) if column.jagged}
    assert set(kind.aligned) <= jagged
    assert set(kind.defaults) <= names - {"sample_ids"}
    assert bool(kind.defaults) == (kind.schema_version > kind.oldest_readable)


@given(messages())
def test_a_good_message_passes(message: Batch):
    message.check()


def test_messages_do_not_change():
    with pytest.raises(AttributeError, match="immutable"):
        prompts().min_versions = np.array([9, 9])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompts": ragged([5, -6], [7])}, "prompts: negative value -6"),
        ({"min_versions": np.array([0, -1])}, "min_versions: negative value -1"),
        ({"references": ragged([0xC3], [], dtype="uint8")}, "references: row 0 is no UTF-8 text"),
        ({"references": ragged([0xC3], [0xA9], dtype="uint8")}, "references: row 0 is no UTF-8 text"),
    ],
    ids=["token", "min_version", "text", "character cut by rows"],
)
def test_prompts_refuse(changes: dict[str, Any], reason: str):
    prompts().check()
    with pytest.raises(ValueError, match=reason):
        prompts(**changes).check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"responses": ragged([8, -9], [1])}, "responses: negative value -9"),
        ({"versions": ragged([0, -1], [1])}, "versions: negative value -1"),
        ({"loss_mask": ragged([1, 2], [0], dtype="uint8")}, "loss_mask: value 2, at most 1"),
        ({"finishes": np.array([0, 2], np.uint8)}, "finishes: value 2, at most 1"),
        ({"log_probs": ragged([-1], [-2], dtype="float32")}, "log_probs: row lengths differ from those of responses"),
        ({"log_probs": ragged([-1, float("-inf")], [-2], dtype="float32")}, "log_probs: 1 of 3 values are not finite"),
        ({"finishes": np.array([0], np.uint8)}, "finishes: 1 rows, sample_ids has 2"),
    ],
    ids=["token", "version", "mask", "finish", "alignment", "infinity", "rows"],
)
def test_rollouts_refuse(changes: dict[str, Any], reason: str):
    rollouts().check()
    with pytest.raises(ValueError, match=reason):
        rollouts(**changes).check()


@given(
    batches(Experience, min_rows=1),
    st.sampled_from(
        ["loss_mask", "log_probs", "advantages", "returns", "values", "reference", "cost_returns", "cost_values"]
    ),
)
def test_experience_is_per_response_token(experience: Experience, name: str):
    column = getattr(experience, name)
    longer = Jagged.from_rows([np.append(row, row[:1] * 0) if len(row) else [0] for row in column], column.dtype)
    with pytest.raises(ValueError, match="row lengths differ"):
        msgspec.structs.replace(experience, **{name: longer}).check()


def test_metrics_say_nothing_by_default():
    assert Metrics() == Metrics(values={}, counts={})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(Metrics(values={"loss": 1.0})), type=Metrics).values == {
        "loss": 1.0
    }
