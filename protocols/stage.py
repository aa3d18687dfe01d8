"""Stages: methods of a role whose annotations declare input and output messages, and `@stage` the transfer protocol.

Tracing reads the contract without importing an implementation, services fire it and workers implement it. So it is
defined here, below all three.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from protocols.data.columns import Batch
from protocols.data.messages import Metrics

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=Batch)
S = TypeVar("S", bound=msgspec.Struct)

Grain = Literal["sample", "prompt", "batch"]
Balance = Literal["rows", "tokens"]


class Failure(msgspec.Struct, frozen=True):
    """A row that a stage could not process. It is sent in the row's place, so that no consumer waits for the row."""

    sample_id: int
    cause: str


class Partial(Generic[M]):
    """A stage's result when some rows failed: the other rows, and the failures by id."""

    __slots__ = ("batch", "failures")

    def __init__(self, batch: M, failures: list[Failure]) -> None:
        self.batch = batch
        self.failures = failures


class StepAbandoned(Exception):
    """An update that was ended half way, because the run ends: the state is as it was before it."""


class Measured(Generic[M]):
    """A stage's result with metrics."""

    __slots__ = ("batch", "metrics")

    def __init__(self, batch: M, metrics: Metrics) -> None:
        self.batch = batch
        self.metrics = metrics


class Stateful(Measured[M], Generic[M, S]):
    """The result of a stateful batch function: batch, metrics, and the state passed to it with the next batch."""

    __slots__ = ("state",)

    def __init__(self, batch: M, metrics: Metrics, state: S) -> None:
        super().__init__(batch, metrics)
        self.state = state


class StageContract(msgspec.Struct, frozen=True):
    """The input, output and transfer protocol of one method of a role."""

    method: str
    protocol: str  # name of a transfer protocol
    consumes: tuple[type[Batch], ...]  # positional inputs; several are joined by id
    produces: type[Batch] | type[Metrics]
    whole_groups: bool = False  # the samples of one prompt are read by one rank
    balance: Balance = "rows"  # what is balanced over ranks: the number of rows, or the sum of their lengths

    @property
    def is_sink(self) -> bool:
        """Whether the stage trains on a closed batch and sends nothing into a channel."""
        return self.produces is Metrics


class _Mark(msgspec.Struct, frozen=True):
    """The arguments of `@stage`; the method's annotations give the rest of the contract."""

    protocol: str
    whole_groups: bool
    balance: Balance


def stage(protocol: str, *, whole_groups: bool = False, balance: Balance = "rows") -> Callable[[F], F]:
    """Mark a role's method as a stage whose rows are distributed by this transfer protocol.

    `whole_groups` keeps the samples of a prompt on one rank; `balance="tokens"` balances the ranks by the lengths of
    their rows. Both matter only to protocols that partition rows. Raises ValueError for another balance.
    """
    if balance not in get_args(Balance):
        raise ValueError(f"stage balance {balance!r}: know {', '.join(get_args(Balance))}")

    def mark(method: F) -> F:
        method.__stage__ = _Mark(protocol, whole_groups, balance)  # type: ignore[attr-defined]
        return method

    return mark


def contract_of(role: type, method: str) -> StageContract:
    """The contract of one stage. Raises LookupError listing the stages of the role."""
    function = getattr(role, method, None)
    mark = getattr(function, "__stage__", None)
    if function is None or mark is None:
        raise LookupError(f"{role.__name__} has no stage {method!r}; it has {', '.join(stages_of(role))}")
    consumes, produces = signature_of(function)
    return StageContract(method, mark.protocol, consumes, produces, mark.whole_groups, mark.balance)


def signature_of(function: Callable[..., Any]) -> tuple[tuple[type[Batch], ...], type[Batch] | type[Metrics]]:
    """The message types of a function's positional parameters (without `self`) and of its result."""
    hints = get_type_hints(function)
    positional = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"
    ]
    name = getattr(function, "__qualname__", repr(function))
    kinds = {p: _message_type(hints.get(p)) for p in [*positional, "return"]}
    for parameter, kind in kinds.items():
        if kind is None:
            raise TypeError(f"{name}: annotate {parameter!r} with a message type, got {hints.get(parameter)!r}")
    return tuple(kinds[p] for p in positional), kinds["return"]  # type: ignore[return-value]


def _message_type(hint: Any) -> type[Batch] | type[Metrics] | None:
    """The message type in an annotation; Scores for `Scores | Partial[Scores]` and `Measured[Scores]`."""
    if get_origin(hint) in (Union, UnionType):
        kinds = {_message_type(a) for a in get_args(hint)}
        return kinds.pop() if len(kinds) == 1 else None
    if get_origin(hint) in (Partial, Measured, Stateful):
        return _message_type(get_args(hint)[0])
    return hint if isinstance(hint, type) and issubclass(hint, (Batch, Metrics)) else None


def stages_of(role: type) -> list[str]:
    """Names of a role's stages."""
    return sorted(name for name in dir(role) if hasattr(getattr(role, name, None), "__stage__"))
