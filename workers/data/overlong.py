"""Rows with more tokens than there is room for: how they are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from workers.data.dataset_files import places_of

MOST_NAMED = 3


def overlong_rows(path: str | Path, rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> str:
    """How many of the N rows of a file are too long, and the first ones with their place and number of tokens.

    `rows` are the overlong rows' numbers, counted from 0; `lengths` is int64 [N]. Raises DataError.
    """
    named = rows[:MOST_NAMED].tolist()
    places = [f"{place} has {lengths[row]} tokens" for place, row in zip(places_of(path, named), named, strict=True)]
    more = f" and {len(rows) - len(named)} more" if len(rows) > len(named) else ""
    return f"{len(rows)} of {len(lengths)} rows: {', '.join(places)}{more}"
