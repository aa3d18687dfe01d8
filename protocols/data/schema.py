"""How schemas grow: reading frames that were written with an older or newer version of a message.

A message grows by adding columns with defaults. A frame of an older version gets the defaults of the columns that it
lacks; the unknown columns of a newer one are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from protocols.data.columns import Batch, ColumnSpec, columns_of
from protocols.data.jagged import Array, Jagged


def check_columns(kind: type[Batch], version: int, columns: tuple[ColumnSpec, ...]) -> None:
    """Raise ValueError unless a frame of `version` with these columns can be read as `kind`."""
    sent = {column.name: column for column in columns}
    what, wanted = f"{kind.__name__} version {version}", columns_of(kind)
    if version < kind.oldest_readable:
        raise ValueError(f"{what} is older than {kind.oldest_readable}, the oldest that this program reads")
    for spec in wanted:
        if spec.name not in sent:
            if version >= kind.schema_version or spec.name not in kind.defaults:
                raise ValueError(f"{what} lacks column {spec.name}")
        elif sent[spec.name] != spec:
            raise ValueError(f"{what}: column {spec.name} is {sent[spec.name].form}, want {spec.form}")
    unknown = sent.keys() - {spec.name for spec in wanted}
    if unknown and version <= kind.schema_version:
        raise ValueError(f"{what} has no column {min(unknown):.40}")


def default_column(kind: type[Batch], spec: ColumnSpec, present: Mapping[str, Array | Jagged]) -> Array | Jagged:
    """The column that an older frame lacks, made from its default and the columns that are present.

    A plain column has the default in every row. A jagged column has it at every token if it is aligned with a present
    column; otherwise the default is the values of one row, `()` for empty rows.
    """
    value, rows = kind.defaults[spec.name], len(present["sample_ids"])
    if not spec.jagged:
        column = np.full(rows, value, spec.dtype)
        column.flags.writeable = False
        return column
    for name in kind.aligned if spec.name in kind.aligned else ():
        if isinstance(peer := present.get(name), Jagged):
            return peer.with_values(np.full(len(peer.values), value, spec.dtype))
    return Jagged.from_rows([value] * rows, dtype=spec.dtype)
