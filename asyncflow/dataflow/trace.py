"""Traces an algorithm function: it runs once with symbolic services, and its calls become a graph.

Adding or removing a line changes the algorithm; placement never does. Every error in the wiring (an unknown role or
stage, a message of the wrong type, an output that no stage reads) is raised here, before a process starts and without
importing torch.
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
STATE = "state"  # the keyword argument by which a stateful batch function gets the state that it returned last


class Declaration(msgspec.Struct, frozen=True):
    """An algorithm's defaults beside its dataflow; the keys of a recipe override them."""

    loss: Loss = Loss()  # defaults of the recipe's [loss]
    advantage: Mapping[str, float | bool | str] = {}  # defaults of [advantage] that differ from the batch function's
    least_samples: int = 1  # per prompt; 2 if samples of a prompt are compared with each other


@overload
def algorithm(function: A) -> A: ...
@overload
def algorithm(
    *, loss: Loss = ..., advantage: Mapping[str, float | bool | str] = ..., least_samples: int = ...
) -> Callable[[A], A]: ...
def algorithm(function: Any = None, **declared: Any) -> Any:
    """Mark a function of one `Flow` as an algorithm for recipes; takes the fields of a `Declaration`, or nothing."""
    declaration = Declaration(**declared)

    def mark(function: A) -> A:
        if len(inspect.signature(function).parameters) != 1:
            raise DataflowError(f"{function.__name__}: an algorithm takes one argument, the flow")
        function.__asyncflow_algorithm__ = declaration  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def declaration_of(function: Algorithm) -> Declaration:
    """The declaration of an algorithm; an empty one for a function that is not marked."""
    return getattr(function, "__asyncflow_algorithm__", Declaration())


class Symbol(msgspec.Struct, frozen=True):
    """The symbolic output of a stage while an algorithm is traced."""

    source: str
    kind: type[Batch]
    grain: Grain

    def __repr__(self) -> str:
        return f"{self.kind.__name__} of {self.source}"


class Flow:
    """The argument of an algorithm function: `flow.<role>.<stage>(...)`, `flow.prompts`, `flow.join(...)`."""

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
        """Join the rows of several stages by sample or by prompt.

        With on="sample" every input has one row per sample. With on="prompt" some inputs have one row per prompt (a
        greedy generation and what is computed from it), which is joined to each of the prompt's samples.
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
            raise DataflowError(f"{where}: sampling is for stages that generate from flow.prompts")
        return first.grain


class Join:
    """Joined rows, to which a function is applied that turns a closed batch into experience."""

    def __init__(self, flow: Flow, inputs: tuple[Symbol, ...], filter: Filter | None = None) -> None:
        self._flow, self._inputs, self._filter = flow, inputs, filter

    def keep(self, function: Callable[..., Any]) -> Join:
        """Train only the prompts that a function finds trainable; for each dropped prompt another is admitted.

        The function is called with the rows of one prompt. Its parameters are annotated with the joined message types
        that it reads, and it returns a bool per row: a prompt without a True ends as dropped (no_signal).
        """
        if self._filter is not None:
            raise DataflowError(f"{function.__name__}: the join is already filtered by {self._filter.name}")
        return Join(self._flow, self._inputs, Filter(function, _seen_by(function, self._inputs)))

    def apply(self, function: Callable[..., Any]) -> Symbol:
        """Run a numpy function on each closed batch, with the rows in the batch's order.

        Its positional parameters are annotated with the joined message types, its return value with Experience. The
        recipe's [advantage] table sets its keyword-only parameters. A keyword-only `state: State | None` receives the
        state that the function returned for the previous batch in a `Stateful`, at first None.
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
    """The state type of a batch function, if any. Raises DataflowError if parameter and return type do not agree."""
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
    """Positions of the inputs that a filter reads, found by their types. Raises DataflowError."""
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
        raise DataflowError(f"{function.__name__}: has no parameter, so it can't tell one prompt from another")
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
