"""Holds the rows of fine-tuning against the model's context: longer ones are refused, left out or cut, and counted."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.data.jagged import Jagged
from workers.data.dataset_files import DataError
from workers.data.hf_folder import config_in
from workers.data.model_config import context_in
from workers.data.overlong import overlong_rows
from workers.data.token_rows import TokenRows

Overlong = Literal["refuse", "skip", "cut"]


class Fitted(NamedTuple):
    """The rows that fit."""

    rows: TokenRows
    kept: npt.NDArray[np.int64]  # their numbers in the file, counted from 0
    skipped: int = 0  # rows of the file that are left out
    cut: int = 0  # rows of the file whose response ends at the context
    warning: str = ""  # which these are; "": none


def fit_to_context(
    rows: TokenRows, overlong: Overlong, path: str, model: str, together: int = 1, hint: str = "overlong = 'skip'"
) -> Fitted:
    """The rows that fit the context of the model's folder; `together` successive ones are a row of the file `path`.

    "cut" ends a response where the context ends, without an end-of-sequence token; a prompt that leaves no room for one
    token is left out. Raises DataError, with `hint` as the remedy, for an overlong row that is to be refused, and if no
    row is left.
    """
    limit = context_in(config_in(model))
    each = rows.prompts.lengths + rows.responses.lengths
    lengths = each.reshape(-1, together).max(axis=1) if len(each) else each
    if limit is None or not len(long := np.flatnonzero(lengths > limit)):
        return Fitted(rows, np.arange(len(lengths)))
    found, why = overlong_rows(path, long, lengths), f"the model's context is {limit} tokens"
    if overlong == "refuse":
        raise DataError(f"{found}: {why}; want shorter rows, or {hint}")
    hopeless = long if overlong == "skip" else long[rows.prompts.lengths[long] >= limit]
    if len(hopeless) == len(lengths):
        raise DataError(f"{path}: none of its rows is short enough, {found}: {why}")
    kept = np.setdiff1d(np.arange(len(lengths)), hopeless)
    left = rows.take((kept[:, None] * together + np.arange(together)).ravel())
    cut = len(long) - len(hopeless)
    done = [f"left out {len(hopeless)}"] * (len(hopeless) > 0) + [f"cut {cut} short"] * (cut > 0)
    warning = f"{' and '.join(done)} of the overlong rows, {found}: {why}"
    return Fitted(_cut(left, limit), kept, len(hopeless), cut, warning)


def _cut(rows: TokenRows, limit: int) -> TokenRows:
    ends: npt.NDArray[np.int64] = np.minimum(rows.responses.lengths, limit - rows.prompts.lengths)
    return TokenRows(rows.prompts, Jagged.gather(rows.responses.values, rows.responses.offsets[:-1], ends))
