"""An algorithm is a traced function: it runs once with symbolic services and becomes a graph.

Adding or removing a line changes the algorithm; placement never does. Everything wrong with the wiring
(an unknown role, a stage that does not exist, a message of the wrong type, an output nobody reads) is
an error here, before a process starts and without importing torch.
"""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints, overload

import msgspec

from asyncflow.dataflow.graph import ADVANTAGE, SOURCE, Dataflow, DataflowError, Filter, Stage, check
from protocols.data.columns import Batch
from protocols.data.messages import Experience, Prompts
from protocols.roles import ROLES, Greedy
from protocols.stage import Grain, StageContract, Stateful, contract_of, signature_of
from workers.settings import Loss

Algorithm = Callable[["Flow"], None]
JoinedOn = Literal["sample", "prompt"]
A = TypeVar("A", bound=Algorithm)
STATE = "state"  # the keyword under which a stateful batch function gets what it returned last


class Declaration(msgspec.Struct, frozen=True):
    """What an algorithm says of itself beside its dataflow. A recipe's own keys stand above the defaults."""

    loss: Loss = Loss()  # defaults of the recipe's [loss]
    advantage: Mapping[str, float | bool | str] = {}  # defaults of [advantage], where they aren't the batch function's
    least_samples: int = 1  # of a prompt; 2 where they are compared with each other


@overload
def algorithm(function: A) -> A: ...
@overload
def algorithm(
    *, loss: Loss = ..., advantage: Mapping[str, float | bool | str] = ..., least_samples: int = ...
) -> Callable[[A], A]: ...
def algorithm(function: Any = None, **declared: Any) -> Any:
    """Mark a function of one `Flow` as an algorithm that recipes may name; bare, or with a `Declaration`'s fields."""
    declaration = Declaration(**declared)

    def mark(function: A) -> A:
        if len(inspect.signature(function).parameters) != 1:
            raise DataflowError(f"{function.__name__}: an algorithm takes one argument, the flow")
        function.__asyncflow_algorithm__ = declaration  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def declaration_of(function: Algorithm) -> Declaration:
    """What an algorithm declared; the defaults for a function that is not marked."""
    return getattr(function, "__asyncflow_algorithm__", Declaration())


class Symbol:
    """Rows that will exist: the output of a stage while an algorithm is traced."""

    __slots__ = ("grain", "kind", "source")

    def __init__(self, source: str, kind: type[Batch], grain: Grain) -> None:
        self.source = source
        self.kind = kind
        self.grain: Grain = grain

    def __repr__(self) -> str:
        return f"{self.kind.__name__} of {self.source}"


class Flow:
    """What an algorithm function is given: `flow.<role>.<stage>(...)`, `flow.prompts`, `flow.join(...)`."""

    def __init__(self, roles: Mapping[str, type]) -> None:
        self._roles = roles
        self._stages: list[Stage] = []
        self._calls: Counter[str] = Counter()
        self.prompts = Symbol(SOURCE, Prompts, "prompt")

    def __getattr__(self, role: str) -> _SymbolicService:
        if role.startswith("__"):
            raise AttributeError(role)
        if role not in self._roles:
            raise DataflowError(f"unknown role {role!r}{_nearest(role, self._roles)}; roles: {', '.join(self._roles)}")
        return _SymbolicService(self, role, self._roles[role])

    def join(self, *inputs: Symbol, on: JoinedOn = "sample") -> Join:
        """Join rows of several stages: by their sample's id, or by their prompt's.

        On "sample" every input has a row per sample. On "prompt" some have one row per prompt (a greedy
        generation and what is computed from it), which is given to each of the prompt's samples.
        """
        if on not in get_args(JoinedOn):
            raise DataflowError(f"join on={on!r}: know {', '.join(get_args(JoinedOn))}")
        _check_symbols("join", inputs)
        _check_grains(inputs, on)
        return Join(self, inputs)

    def _add(
        self, service: str, method: str, inputs: tuple[Symbol, ...], produces: Any, grain: Grain, **rest: Any
    ) -> Symbol:
        label = method if service == ADVANTAGE else f"{service}.{method}"
        self._calls[label] += 1
        stage = Stage(
            name=f"{label}#{self._calls[label]}",
            service=service,
            method=method,
            produces=produces,
            inputs=tuple(s.source for s in inputs),
            grain=grain,
            **rest,
        )
        self._stages.append(stage)
        return Symbol(stage.name, produces, grain)


class _SymbolicService:
    def __init__(self, flow: Flow, role: str, contract: type) -> None:
        self._flow, self._role, self._contract = flow, role, contract

    def __getattr__(self, method: str) -> Callable[..., Symbol]:
        try:
            contract = contract_of(self._contract, method)
        except LookupError as error:
            raise DataflowError(f"flow.{self._role}.{method}: {error.args[0]}") from None

        def call(*inputs: Symbol, sampling: Greedy | None = None) -> Symbol:
            _match(f"{self._role}.{method}", contract.consumes, inputs)
            return self._flow._add(
                self._role,
                method,
                inputs,
                contract.produces,
                self._grain(contract, inputs, sampling),
                consumes=contract.consumes,
                protocol=contract.protocol,
                greedy=sampling is not None,
            )

        return call

    def _grain(self, contract: StageContract, inputs: tuple[Symbol, ...], sampling: Greedy | None) -> Grain:
        if contract.is_sink:
            return "batch"
        where, first = f"{self._role}.{contract.method}", inputs[0]
        if len({symbol.grain for symbol in inputs}) > 1:
            raise DataflowError(f"{where} takes rows of one grain, got {_with_grains(inputs)}")
        if first.source == SOURCE:
            return "prompt" if sampling is not None else "sample"
        if sampling is not None:
            raise DataflowError(f"{where}: sampling is for stages that draw from flow.prompts")
        return first.grain


class Join:
    """Joined rows, waiting for the function that turns a closed batch into experience."""

    def __init__(self, flow: Flow, inputs: tuple[Symbol, ...], filter: Filter | None = None) -> None:
        self._flow, self._inputs, self._filter = flow, inputs, filter

    def keep(self, function: Callable[..., Any]) -> Join:
        """Train only prompts that a function finds worth it; others are admitted in the place of those it drops.

        The function is called with the rows of one prompt. Its parameters are annotated with the joined message types
        that it wants to see, and it returns a bool per row: a prompt without a True ends as dropped (no_signal).
        """
        if self._filter is not None:
            raise DataflowError(f"{function.__name__}: the join keeps what {self._filter.name} chooses already")
        return Join(self._flow, self._inputs, Filter(function, _seen_by(function, self._inputs)))

    def apply(self, function: Callable[..., Any]) -> Symbol:
        """Run a numpy function on each closed batch, rows in the batch's order.

        Its positional parameters are annotated with the joined message types, its return value with
        Experience; keyword-only parameters are numbers that the recipe's [advantage] table sets. A keyword-only
        `state: State | None` is what the function returned with the batch before, in a `Stateful`; None at first.
        """
        try:
            consumes, produces = signature_of(function)
        except TypeError as error:
            raise DataflowError(str(error)) from None
        if produces is not Experience:
            raise DataflowError(
                f"{function.__name__}: returns {produces.__name__}, a batch function returns Experience"
            )
        _match(function.__name__, consumes, self._inputs)
        return self._flow._add(
            ADVANTAGE,
            function.__name__,
            self._inputs,
            produces,
            "batch",
            consumes=consumes,
            protocol="RANK_ZERO",
            function=function,
            filter=self._filter,
            state=_state_of(function),
        )


def trace(function: Algorithm, roles: Mapping[str, type] | None = None) -> Dataflow:
    """Run an algorithm with symbols and check the graph.

    Args:
        function: the algorithm.
        roles: role contracts by name, `protocols.roles.ROLES` by default; a user's own roles go here.

    Raises:
        DataflowError: for anything that could not run.
    """
    flow = Flow(ROLES if roles is None else roles)
    function(flow)
    return check(function.__name__, tuple(flow._stages))


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a batch function that a recipe sets, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != STATE}


def _state_of(function: Callable[..., Any]) -> type[msgspec.Struct] | None:
    """The type of what a batch function carries from batch to batch. Raises DataflowError where it is half said."""
    hints = get_type_hints(function)
    takes, returns = hints.get(STATE), hints["return"]
    kind = get_args(returns)[1] if get_origin(returns) is Stateful else None
    if takes is None and kind is None:
        return None
    if kind is None or takes != kind | None:
        raise DataflowError(
            f"{function.__name__}: a stateful batch function takes a keyword `state: State | None` and returns "
            f"Stateful[Experience, State]; it takes {takes} and returns {returns}"
        )
    return kind


def _seen_by(function: Callable[..., Any], inputs: tuple[Symbol, ...]) -> tuple[int, ...]:
    """Positions of the joined rows that a filter takes, found by their types. Raises DataflowError."""
    hints = get_type_hints(function)
    found = []
    for name in inspect.signature(function).parameters:
        kind = hints.get(name)
        places = [p for p, symbol in enumerate(inputs) if symbol.kind is kind and symbol.grain == "sample"]
        if len(places) != 1:
            raise DataflowError(
                f"{function.__name__}: {name} is {getattr(kind, '__name__', kind)}, of which the join has "
                f"{len(places)} with a row per sample, want one; it has {', '.join(map(repr, inputs))}"
            )
        found.append(places[0])
    if not found:
        raise DataflowError(f"{function.__name__}: takes nothing, so it can't tell one prompt from another")
    return tuple(found)


def _match(where: str, wanted: tuple[type[Batch], ...], given: tuple[Any, ...]) -> None:
    _check_symbols(where, given)
    if len(wanted) != len(given) or any(s.kind is not k for s, k in zip(given, wanted, strict=True)):
        takes = ", ".join(k.__name__ for k in wanted)
        raise DataflowError(f"{where} takes ({takes}), got ({', '.join(map(repr, given))})")


def _check_symbols(where: str, given: tuple[Any, ...]) -> None:
    for symbol in given:
        if not isinstance(symbol, Symbol):
            raise DataflowError(f"{where}: takes outputs of stages, got {symbol!r}")


def _check_grains(inputs: tuple[Symbol, ...], on: JoinedOn) -> None:
    """Refuse a join whose inputs could never meet. Raises DataflowError."""
    for symbol in inputs:
        if symbol.source == SOURCE:
            raise DataflowError(f"join of {symbol!r}: prompts go to stages that generate")
        if symbol.grain == "batch":
            raise DataflowError(f"join of {symbol!r}: a closed batch is not joined again")
    grains = {s.grain for s in inputs}
    if "sample" not in grains:
        raise DataflowError(f"join of {list(inputs)}: no input has a row per sample")
    if on == "sample" and "prompt" in grains:
        raise DataflowError(
            f"join of {_with_grains(inputs)}: on='prompt' gives a prompt's one row to each of its samples"
        )
    if on == "prompt" and "prompt" not in grains:
        raise DataflowError(f"join of {list(inputs)} on='prompt': no input has a row per prompt, so it is on='sample'")


def _with_grains(symbols: tuple[Symbol, ...]) -> str:
    return ", ".join(f"{symbol!r} per {symbol.grain}" for symbol in symbols)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
