"""Batches: columns over the same N rows, and the generic operations on rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.jagged import Array, Jagged, frozen_view


class ColumnSpec(msgspec.Struct, frozen=True):
    """The declaration of one column, in a message type and in a frame's header."""

    name: str
    dtype: str  # numpy's name, little endian
    jagged: bool

    @property
    def form(self) -> str:
        """For errors: "jagged int32"."""
        return f"{'jagged ' if self.jagged else ''}{self.dtype}"


class _Type(msgspec.Struct, frozen=True):
    dtype: str


Int64 = Annotated[Array, _Type("int64")]
Float32 = Annotated[Array, _Type("float32")]
UInt8 = Annotated[Array, _Type("uint8")]
JaggedInt32 = Annotated[Jagged, _Type("int32")]
JaggedFloat32 = Annotated[Jagged, _Type("float32")]
JaggedUInt8 = Annotated[Jagged, _Type("uint8")]
Text = Annotated[Jagged, _Type("uint8")]  # UTF-8, one text a row


class Batch(msgspec.Struct, frozen=True, kw_only=True, eq=False):  # noqa: PLW1641 - rows have no hash
    """N rows of one type. Subclasses declare columns; `sample_ids` identify the rows and are unique.

    A subclass is *one* stage of a sample's life. `aligned` are jagged columns whose rows have equal lengths. To add a
    column, raise `schema_version` and give the column a default, which is used for frames of an older version (see
    `protocols.data.schema`). Any other change is a new message with a new `schema_id`.
    """

    schema_id: ClassVar[int] = 0
    schema_version: ClassVar[int] = 1
    oldest_readable: ClassVar[int] = 1  # version; raised when a column is renamed
    aligned: ClassVar[tuple[str, ...]] = ()
    tokens: ClassVar[tuple[str, ...]] = ()  # columns whose lengths add up to a row's tokens
    defaults: ClassVar[Mapping[str, float | tuple[float, ...]]] = {}

    sample_ids: Int64  # [N] see protocols.data.ids

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(
            a == b if isinstance(a, Jagged) else np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
            for a, b in ((getattr(self, c.name), getattr(other, c.name)) for c in columns_of(type(self)))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        columns = [getattr(self, spec.name) for spec in columns_of(type(self))]
        return sum(c.values.nbytes + c.offsets.nbytes if isinstance(c, Jagged) else c.nbytes for c in columns)

    @property
    def token_counts(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, int64 [N]: the weight used to balance ranks; 1 for messages without tokens."""
        if not self.tokens:
            return np.ones(len(self), np.int64)
        return np.sum([getattr(self, name).lengths for name in self.tokens], axis=0)

    def check(self) -> None:
        """Validate the values. Raises ValueError naming column, row and value."""
        for spec in columns_of(type(self)):
            check_form(self, spec)
            _check_finite(self, spec)
        if len(self) and int(self.sample_ids.min()) < 0:
            raise ValueError(f"sample_ids: negative id {int(self.sample_ids.min())}")
        ordered = np.sort(self.sample_ids)
        if bool(np.any(ordered[1:] == ordered[:-1])):
            raise ValueError(f"sample_ids: an id occurs twice in {len(self)} rows")
        for name in self.aligned[1:]:
            if not np.array_equal(getattr(self, self.aligned[0]).offsets, getattr(self, name).offsets):
                raise ValueError(f"{name}: row lengths differ from those of {self.aligned[0]}")


B = TypeVar("B", bound=Batch)


def check_form(batch: Batch, spec: ColumnSpec) -> None:
    """Raise ValueError unless a column has its declared type and one entry per row."""
    column, where = getattr(batch, spec.name), f"{type(batch).__name__}.{spec.name}"
    wanted = Jagged if spec.jagged else np.ndarray
    if not isinstance(column, np.ndarray | Jagged):
        raise ValueError(f"{where} is a {type(column).__name__}, want {spec.form} in a {wanted.__name__}")
    actual = ColumnSpec(spec.name, column.dtype.name, isinstance(column, Jagged))
    if actual != spec:
        raise ValueError(f"{where} is {actual.form}, want {spec.form}")
    if isinstance(column, np.ndarray) and column.ndim != 1:
        raise ValueError(f"{where}: shape {list(column.shape)}, want one value a row")
    if len(column) != len(batch):
        raise ValueError(f"{where}: {len(column)} rows, sample_ids has {len(batch)}")


def _check_finite(batch: Batch, spec: ColumnSpec) -> None:
    column = getattr(batch, spec.name)
    values = column.values if isinstance(column, Jagged) else column
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{spec.name}: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite")


@functools.cache
def columns_of(kind: type[Batch]) -> tuple[ColumnSpec, ...]:
    """The columns of a message type, in declaration order."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_spec(name, hints[name]) for name in kind.__struct_fields__)


def _spec(name: str, hint: Any) -> ColumnSpec:
    base, marker = get_args(hint)[:2] if get_origin(hint) is Annotated else (None, None)
    if not isinstance(marker, _Type):
        raise TypeError(f"{name} is no column type: annotate the field with a type of protocols.data.columns")
    return ColumnSpec(name, marker.dtype, base is Jagged)


def take(batch: B, rows: npt.ArrayLike) -> B:
    """The given rows of a batch, in the given order."""
    index = np.asarray(rows, dtype=np.int64)
    columns = {spec.name: getattr(batch, spec.name) for spec in columns_of(type(batch))}
    taken: dict[str, Any] = {
        name: c.take(index) if isinstance(c, Jagged) else frozen_view(c[index]) for name, c in columns.items()
    }
    return type(batch)(**taken)


def concat(batches: Sequence[B]) -> B:
    """All rows of several batches of one type, in order."""
    if not batches:
        raise ValueError("concat needs at least one batch: an empty list has no type")
    if len(batches) == 1:
        return batches[0]
    kind = type(batches[0])
    if any(type(b) is not kind for b in batches):
        raise TypeError(f"concat of different messages: {sorted({type(b).__name__ for b in batches})}")
    joined: dict[str, Any] = {}
    for spec in columns_of(kind):
        parts = [getattr(batch, spec.name) for batch in batches]
        joined[spec.name] = Jagged.concat(parts) if spec.jagged else frozen_view(np.concatenate(parts))
    return kind(**joined)


def empty(kind: type[B]) -> B:
    """A batch of no rows."""
    columns: dict[str, Any] = {
        c.name: Jagged(np.empty(0, c.dtype), np.zeros(1, np.int64)) if c.jagged else frozen_view(np.empty(0, c.dtype))
        for c in columns_of(kind)
    }
    return kind(**columns)


def rows_of(batch: Batch, sample_ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Row indices of the given ids. Raises KeyError naming the first id that is missing."""
    wanted = np.asarray(sample_ids, dtype=np.int64)
    order = np.argsort(batch.sample_ids, kind="stable")
    at = np.searchsorted(batch.sample_ids, wanted, sorter=order)
    found = order[np.minimum(at, max(len(batch) - 1, 0))] if len(batch) else np.zeros(len(wanted), np.int64)
    missing = wanted != batch.sample_ids[found] if len(batch) else np.ones(len(wanted), bool)
    if missing.any():
        raise KeyError(f"sample {int(wanted[missing][0])} is not among the {len(batch)} rows of {type(batch).__name__}")
    return found


def select(batch: B, sample_ids: npt.ArrayLike) -> B:
    """The rows with the given ids, in the order of the ids."""
    return take(batch, rows_of(batch, sample_ids))
