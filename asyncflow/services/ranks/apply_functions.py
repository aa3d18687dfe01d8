"""ApplyFunctions: a closing stage's batch function and filter as a worker, with the state between two batches.

The state changes when a batch is closed. A checkpoint holds the state of the last committed step: it is written between
two steps, or after `keep_committed`, which goes back to the state before the batch of a step that is never committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from asyncflow.dataflow.graph import Stage
from protocols.control.code import CodeSource
from protocols.stage import Stateful
from workers.user_code import install, new_module

STATE = "state.json"


Remake = Callable[[ModuleType], Stage]  # the stage in a new module of the algorithm; raises DataflowError


class ApplyFunctions:
    """The worker of the advantage service. Its methods have the names of the functions."""

    def __init__(
        self, stage: Stage, module: str = "", remake: Remake | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Args:

        module: the name of the user's module, if the algorithm is theirs; `remake` builds its stage anew.
        kwargs: further arguments of the batch function.
        """
        assert stage.function is not None, f"{stage.name} closes no batch"
        self._stage, self._function = stage, stage.function
        self._state: msgspec.Struct | None = None
        self._before: msgspec.Struct | None = None  # the last batch
        self._closed = 0  # batches
        self._committed: int | None = None  # of these, once the run abandons a step
        self._module, self._remake, self._kwargs = module, remake, dict(kwargs or {})
        self._next: tuple[Stage, msgspec.Struct | None, ModuleType] | None = None
        setattr(self, stage.method, self._apply)
        if stage.filter is not None:
            setattr(self, stage.filter.name, self._filter)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Prepare the functions of a changed file. Raises BadCode, or DataflowError if the dataflow has changed.

        The current state must be readable as the new function's state.
        """
        self._next = None
        for source in sources:
            if source.module == self._module and self._remake is not None:
                with new_module(source) as module:
                    stage = self._remake(module)
                    self._next = stage, self._read(msgspec.json.encode(self._state), stage), module

    def switch_code(self, take: bool) -> None:
        """Use the prepared functions from the next batch on, or drop them."""
        if take and self._next is not None:
            self._stage, self._state, module = self._next
            assert self._stage.function is not None
            self._function = self._stage.function
            install(module)
        self._next = None

    def _apply(self, *inputs: Any) -> Any:
        return self._function(*inputs, **self._kwargs) if self._stage.state is None else self._carry(*inputs)

    def _filter(self, *inputs: Any) -> Any:
        assert self._stage.filter is not None
        return self._stage.filter.function(*inputs)

    def _carry(self, *inputs: Any) -> Stateful[Any, Any]:
        """Call the batch function with the state that its last call returned. Raises TypeError if it returns none.

        If the function raises, the state does not change.
        """
        name, kind = self._stage.name, self._stage.state
        assert kind is not None
        result = self._function(*inputs, state=self._state, **self._kwargs)
        if not isinstance(result, Stateful) or not isinstance(result.state, kind):
            raise TypeError(f"{name}: returned {result!r:.80}, want Stateful with a {kind.__name__}")
        self._before, self._state = self._state, result.state
        self._closed += 1
        return result

    def keep_committed(self, committed: int) -> None:
        """Of the batches closed so far, this many belong to committed steps; `save` leaves out the one after them."""
        self._committed = committed

    def save(self, folder: str) -> None:
        """Write the state into an existing folder."""
        uncommitted = self._committed is not None and self._closed > self._committed
        (Path(folder) / STATE).write_bytes(msgspec.json.encode(self._before if uncommitted else self._state))

    def load(self, folder: str) -> None:
        """Load a saved state. Raises msgspec.ValidationError if it is another function's."""
        self._state = self._read((Path(folder) / STATE).read_bytes(), self._stage)

    @staticmethod
    def _read(saved: bytes, stage: Stage) -> msgspec.Struct | None:
        """Decode a saved state as the state of a stage."""
        return None if saved == b"null" else msgspec.json.decode(saved, type=stage.state)
