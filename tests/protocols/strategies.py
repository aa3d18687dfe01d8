"""Hypothesis strategies for messages: small batches that `check` accepts, including empty rows and no rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocols.data.columns import B, Batch, ColumnSpec, columns_of
from protocols.data.jagged import Array, Jagged
from protocols.data.messages import SCHEMAS, Finish
from protocols.layout.topology import Topology

_HIGHEST = {"loss_mask": 1, "finishes": max(Finish)}

sample_ids = st.integers(0, 2**63 - 1)


def topologies(max_pp: int = 3, max_tp: int = 4, max_dp: int = 3) -> st.SearchStrategy[Topology]:
    """Any small topology."""
    return st.builds(Topology, st.integers(1, max_pp), st.integers(1, max_tp), st.integers(1, max_dp))


def jagged(dtype: str = "int32", max_rows: int = 6) -> st.SearchStrategy[Jagged]:
    """A jagged column of numbers >= 0."""
    spec = ColumnSpec("", dtype, jagged=True)
    lengths = st.lists(st.integers(0, 5), max_size=max_rows)
    return lengths.flatmap(lambda counts: _values(spec, sum(counts)).map(lambda v: Jagged.from_lengths(v, counts)))


@st.composite
def batches(draw: st.DrawFn, kind: type[B], min_rows: int = 0, max_rows: int = 5) -> B:
    """A batch of one message type whose aligned columns agree."""
    rows = draw(st.integers(min_rows, max_rows))
    lengths = st.lists(st.integers(0, 4), min_size=rows, max_size=rows)
    shared = {name: counts for counts in [draw(lengths)] for name in kind.aligned}
    columns: dict[str, Any] = {}
    for spec in columns_of(kind):
        if spec.name == "sample_ids":
            ids = draw(st.lists(sample_ids, min_size=rows, max_size=rows, unique=True))
            columns[spec.name] = np.array(ids, dtype=np.int64)
        elif spec.name == "names":
            columns[spec.name] = Jagged.from_texts("\n".join("x" * count) for count in columns["parts"].lengths)
        elif spec.name in ("references", "columns"):
            columns[spec.name] = Jagged.from_texts(draw(st.lists(st.text(max_size=3), min_size=rows, max_size=rows)))
        elif spec.jagged:
            counts = shared[spec.name] if spec.name in shared else draw(lengths)
            columns[spec.name] = Jagged.from_lengths(draw(_values(spec, sum(counts))), counts)
        else:
            columns[spec.name] = draw(_values(spec, rows))
    return kind(**columns)


def messages(min_rows: int = 0) -> st.SearchStrategy[Batch]:
    """A batch of any message type."""
    return st.sampled_from(sorted(SCHEMAS)).flatmap(lambda schema: batches(SCHEMAS[schema], min_rows))


def _values(spec: ColumnSpec, count: int) -> st.SearchStrategy[Array]:
    dtype = np.dtype(spec.dtype)
    elements: st.SearchStrategy[Any]
    if dtype.kind == "f":
        elements = st.floats(width=32, allow_nan=False, allow_infinity=False)
    else:
        elements = st.integers(0, _HIGHEST.get(spec.name, int(np.iinfo(dtype).max)))
    return hnp.arrays(dtype, count, elements=elements)
