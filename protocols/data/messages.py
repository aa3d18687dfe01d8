"""The messages: one frozen batch type per stage of a sample's life.

The type's name is the stage, and every column of it is filled. N is the number of rows, P_i and T_i are the numbers of
prompt and response tokens of row i. Ids are int64, tokens int32, log-probs, values and rewards float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import ClassVar

import msgspec
import numpy as np

from protocols.data.columns import Batch, Float32, Int64, JaggedFloat32, JaggedInt32, JaggedUInt8, Text, UInt8
from protocols.data.jagged import Jagged


class Finish(IntEnum):
    """Why a response ended."""

    STOP = 0  # end-of-sequence token, which is part of the response
    LENGTH = 1  # reached max_tokens


_NO_NUMBERS = Jagged.from_rows([])
_NO_TEXT = Jagged.from_texts([])
_LINE_END = ord("\n")


class Prompts(Batch, frozen=True, kw_only=True, eq=False):
    """Requests for one response per row; a prompt with n samples has n rows. `columns` may be omitted."""

    schema_id: ClassVar[int] = 1
    schema_version: ClassVar[int] = 3
    oldest_readable: ClassVar[int] = 2  # version 1 called `min_versions` "floors"
    tokens: ClassVar[tuple[str, ...]] = ("prompts",)
    defaults: ClassVar[Mapping[str, float | tuple[float, ...]]] = {"columns": ()}  # since version 3

    prompts: JaggedInt32  # [N, P_i] token ids
    references: Text  # [N] reference answer of the data row, "" if it has none; for rewards and evaluation
    min_versions: Int64  # [N] version at admission: only weights of this version or newer may generate the row
    columns: Text = _NO_TEXT  # [N] a JSON object of the data row's columns that rules ask for, "" where none does

    def __post_init__(self) -> None:
        _fill_omitted(self)

    def check(self) -> None:
        super().check()
        _check_range(self, "prompts")
        _check_range(self, "min_versions")
        _check_text(self, "references")
        _check_text(self, "columns")


class Rollouts(Batch, frozen=True, kw_only=True, eq=False):
    """Finished responses. `columns` may be omitted."""

    schema_id: ClassVar[int] = 2
    schema_version: ClassVar[int] = 2
    defaults: ClassVar[Mapping[str, float | tuple[float, ...]]] = {"columns": ()}  # since version 2
    tokens: ClassVar[tuple[str, ...]] = ("prompts", "responses")
    aligned: ClassVar[tuple[str, ...]] = ("responses", "log_probs", "versions", "loss_mask")

    prompts: JaggedInt32  # [N, P_i]
    references: Text  # [N]
    responses: JaggedInt32  # [N, T_i], with its end-of-sequence token where finish is STOP
    log_probs: JaggedFloat32  # [N, T_i] mu: rollout log-probs, under the weights that sampled the token
    versions: JaggedInt32  # [N, T_i] step of the weights that sampled each token; their term is the frame's
    loss_mask: JaggedUInt8  # [N, T_i] 1 where the policy sampled the token and it is trained
    finishes: UInt8  # [N] Finish
    columns: Text = _NO_TEXT  # [N] as in Prompts

    def __post_init__(self) -> None:
        _fill_omitted(self)

    def check(self) -> None:
        super().check()
        for name in ("prompts", "responses", "versions"):
            _check_range(self, name)
        _check_range(self, "loss_mask", high=1)
        _check_range(self, "finishes", high=max(Finish))
        _check_text(self, "references")
        _check_text(self, "columns")


class LogProbs(Batch, frozen=True, kw_only=True, eq=False):
    """Log-probs of the response tokens under one model."""

    schema_id: ClassVar[int] = 3
    tokens: ClassVar[tuple[str, ...]] = ("log_probs",)

    log_probs: JaggedFloat32  # [N, T_i]


class Values(Batch, frozen=True, kw_only=True, eq=False):
    """A critic's value of the state before each response token."""

    schema_id: ClassVar[int] = 4
    tokens: ClassVar[tuple[str, ...]] = ("values",)

    values: JaggedFloat32  # [N, T_i]
    versions: Int64  # [N] step of the critic's weights


class Scores(Batch, frozen=True, kw_only=True, eq=False):
    """A reward per response. `parts` and their names may be omitted; their rows are then empty."""

    schema_id: ClassVar[int] = 5
    schema_version: ClassVar[int] = 3
    defaults: ClassVar[Mapping[str, float | tuple[float, ...]]] = {
        "parts": (),  # since version 2
        "names": (),  # since version 3
    }

    scores: Float32  # [N]
    parts: JaggedFloat32 = _NO_NUMBERS  # [N, K_i] the K_i parts of a score, before their weights
    names: Text = _NO_TEXT  # [N] the names of a row's parts, joined by line ends; "": they have none

    def __post_init__(self) -> None:
        _fill_omitted(self)

    def check(self) -> None:
        super().check()
        _check_text(self, "names")
        counts = np.array([len(row) and 1 + int((row == _LINE_END).sum()) for row in self.names], np.int64)
        if bool(wrong := np.flatnonzero((counts != 0) & (counts != self.parts.lengths)).tolist()):
            row = wrong[0]
            raise ValueError(f"names: row {row} has {counts[row]} names for {self.parts.lengths[row]} parts")


class Costs(Batch, frozen=True, kw_only=True, eq=False):
    """A cost per response: positive is unsafe."""

    schema_id: ClassVar[int] = 6

    costs: Float32  # [N]


class Experience(Batch, frozen=True, kw_only=True, eq=False):
    """The training batch: exactly the rows of one step, in the batch's order."""

    schema_id: ClassVar[int] = 7
    schema_version: ClassVar[int] = 3
    tokens: ClassVar[tuple[str, ...]] = ("prompts", "responses")
    aligned: ClassVar[tuple[str, ...]] = (
        "responses",
        "log_probs",
        "loss_mask",
        "advantages",
        "returns",
        "values",
        "reference",
        "cost_returns",
        "cost_values",
    )
    defaults: ClassVar[Mapping[str, float | tuple[float, ...]]] = {
        "reference": 0.0,  # since version 2
        "cost_returns": 0.0,  # since version 3
        "cost_values": 0.0,  # since version 3
    }

    prompts: JaggedInt32  # [N, P_i]
    responses: JaggedInt32  # [N, T_i]
    loss_mask: JaggedUInt8  # [N, T_i]
    log_probs: JaggedFloat32  # [N, T_i] mu
    advantages: JaggedFloat32  # [N, T_i] whitened if the estimator whitens
    returns: JaggedFloat32  # [N, T_i] the critic's targets; 0 without a critic
    values: JaggedFloat32  # [N, T_i] the critic's values before the update; 0 without a critic
    reference: JaggedFloat32  # [N, T_i] log-probs under the reference, for a KL in the loss; 0 without a reference
    cost_returns: JaggedFloat32  # [N, T_i] the cost critic's targets; 0 without a cost critic
    cost_values: JaggedFloat32  # [N, T_i] the cost critic's values before the update; 0 without a cost critic

    def check(self) -> None:
        super().check()
        for name in ("prompts", "responses"):
            _check_range(self, name)
        _check_range(self, "loss_mask", high=1)


class Metrics(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Metrics of one stage call: each value is a mean over its count, so metrics of replicas can be averaged."""

    values: dict[str, float] = {}
    counts: dict[str, float] = {}  # weight of each value, by default 1


SCHEMAS: dict[int, type[Batch]] = {
    kind.schema_id: kind for kind in (Prompts, Rollouts, LogProbs, Values, Scores, Costs, Experience)
}


def _fill_omitted(batch: Batch) -> None:
    """Give a jagged column that was left out an empty row for each sample."""
    for omitted in (_NO_NUMBERS, _NO_TEXT):
        for name in (name for name in batch.__struct_fields__ if getattr(batch, name) is omitted):
            offsets = np.zeros(len(batch.sample_ids) + 1, np.int64)
            msgspec.structs.force_setattr(batch, name, Jagged(np.empty(0, omitted.dtype), offsets))


def _check_range(batch: Batch, name: str, high: int | None = None) -> None:
    """The values of an integer column lie in [0, high]; None: no upper bound. Raises ValueError."""
    column = getattr(batch, name)
    values = column.values if isinstance(column, Jagged) else column
    if len(values) and int(values.min()) < 0:
        raise ValueError(f"{name}: negative value {int(values.min())}")
    if high is not None and len(values) and int(values.max()) > high:
        raise ValueError(f"{name}: value {int(values.max())}, at most {high} has a meaning")


def _check_text(batch: Batch, name: str) -> None:
    """Every row is UTF-8, so that `Jagged.text` works for every reader. Raises ValueError."""
    column: Jagged = getattr(batch, name)
    values = column.values
    if not len(values) or int(values.max()) < 0x80:  # ASCII
        return
    for row in range(len(column)):
        try:
            column.text(row)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: row {row} is no UTF-8 text: {error.reason} at byte {error.start}") from error
