"""A stage is a method of a role: its annotations say what it consumes and produces, `@stage` how its rows are cut.

The contract is read by tracing (which never imports an implementation), by services (which fire it) and
by workers (which implement it), so it stands here, below all three.
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
    """One row that a stage could not do: it travels as a tombstone in the row's place."""

    sample_id: int
    cause: str


class Partial(Generic[M]):
    """What a stage returns when some of its rows failed: the others, and the failures by id."""

    __slots__ = ("batch", "failures")

    def __init__(self, batch: M, failures: list[Failure]) -> None:
        self.batch = batch
        self.failures = failures


class Measured(Generic[M]):
    """What a stage returns when it measured something on the way: the batch and its metrics."""

    __slots__ = ("batch", "metrics")

    def __init__(self, batch: M, metrics: Metrics) -> None:
        self.batch = batch
        self.metrics = metrics


class Stateful(Measured[M], Generic[M, S]):
    """What a stateful batch function returns: besides, the state that it is given with the next batch."""

    __slots__ = ("state",)

    def __init__(self, batch: M, metrics: Metrics, state: S) -> None:
        super().__init__(batch, metrics)
        self.state = state


class StageContract(msgspec.Struct, frozen=True):
    """What one method of a role takes and gives."""

    method: str
    protocol: str  # name of a transfer protocol
    consumes: tuple[type[Batch], ...]  # positional inputs; more than one is a join by id
    produces: type[Batch] | type[Metrics]
    whole_groups: bool = False  # a group, the samples of one prompt, is never cut
    balance: Balance = "rows"  # what a cut makes even: the number of rows, or the sum of their lengths

    @property
    def is_sink(self) -> bool:
        """A sink trains on a closed batch and puts nothing into a channel."""
        return self.produces is Metrics


class _Mark(msgspec.Struct, frozen=True):
    """What `@stage` says of a method; its annotations say the rest of the contract."""

    protocol: str
    whole_groups: bool
    balance: Balance


def stage(protocol: str, *, whole_groups: bool = False, balance: Balance = "rows") -> Callable[[F], F]:
    """Mark a role's method as a stage whose rows are cut by the transfer protocol of that name.

    `whole_groups` keeps the samples of a prompt on one rank; `balance="tokens"` makes the parts even by the
    lengths of their rows. Both matter only to a protocol that cuts. Raises ValueError for another balance.
    """
    if balance not in get_args(Balance):
        raise ValueError(f"stage balance {balance!r}: know {', '.join(get_args(Balance))}")

    def mark(method: F) -> F:
        method.__stage__ = _Mark(protocol, whole_groups, balance)  # type: ignore[attr-defined]
        return method

    return mark


def contract_of(role: type, method: str) -> StageContract:
    """The contract of one stage. Raises LookupError naming the stages that the role has."""
    function = getattr(role, method, None)
    mark = getattr(function, "__stage__", None)
    if function is None or mark is None:
        raise LookupError(f"{role.__name__} has no stage {method!r}; it has {', '.join(stages_of(role))}")
    consumes, produces = signature_of(function)
    return StageContract(method, mark.protocol, consumes, produces, mark.whole_groups, mark.balance)


def signature_of(function: Callable[..., Any]) -> tuple[tuple[type[Batch], ...], type[Batch] | type[Metrics]]:
    """Message types a function takes (positional parameters but `self`) and the one that it returns."""
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
    """The message type an annotation names: `Scores | Partial[Scores]` and `Measured[Scores]` name Scores."""
    if get_origin(hint) in (Union, UnionType):
        kinds = {_message_type(a) for a in get_args(hint)}
        return kinds.pop() if len(kinds) == 1 else None
    if get_origin(hint) in (Partial, Measured, Stateful):
        return _message_type(get_args(hint)[0])
    return hint if isinstance(hint, type) and issubclass(hint, (Batch, Metrics)) else None


def stages_of(role: type) -> list[str]:
    """Names of a role's stages."""
    return sorted(name for name in dir(role) if hasattr(getattr(role, name, None), "__stage__"))
