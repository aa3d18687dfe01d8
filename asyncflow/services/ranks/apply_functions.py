"""The functions of a closing stage as a worker: its batch function, its filter, and the state between two batches.

The state moves when a batch is closed. A checkpoint is written between two steps only, so what it holds is the
state of its last committed step: a step that is given up takes the run back to a checkpoint, and the state with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from asyncflow.dataflow.graph import Stage
from protocols.control.requests import CodeSource
from protocols.stage import Stateful
from workers.user_code import install, new_module

STATE = "state.json"


Remake = Callable[[ModuleType], Stage]  # the stage as a new module of the algorithm has it; raises DataflowError


class ApplyFunctions:
    """The worker of the advantage service; its methods have the functions' names."""

    def __init__(
        self, stage: Stage, module: str = "", remake: Remake | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """`module`: the user's, where the algorithm is theirs; `remake` makes its stage anew.

        `kwargs`: the batch function is called with these, beside its inputs.
        """
        assert stage.function is not None, f"{stage.name} closes no batch"
        self._stage, self._function = stage, stage.function
        self._state: msgspec.Struct | None = None
        self._module, self._remake, self._kwargs = module, remake, dict(kwargs or {})
        self._next: tuple[Stage, msgspec.Struct | None, ModuleType] | None = None
        setattr(self, stage.method, self._apply)
        if stage.filter is not None:
            setattr(self, stage.filter.name, self._filter)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make the functions anew where their file is among these. Raises BadCode, and DataflowError for other wiring.

        What is carried from batch to batch must be readable as the new function's state.
        """
        self._next = None
        for source in sources:
            if source.module == self._module and self._remake is not None:
                with new_module(source) as module:
                    stage = self._remake(module)
                    self._next = stage, self._read(msgspec.json.encode(self._state), stage), module

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next batch on, or drop it."""
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
        """Call the batch function with the state that its last call returned. Raises TypeError where it returns none.

        Where the function raises the state stays as it was.
        """
        name, kind = self._stage.name, self._stage.state
        assert kind is not None
        result = self._function(*inputs, state=self._state, **self._kwargs)
        if not isinstance(result, Stateful) or not isinstance(result.state, kind):
            raise TypeError(f"{name}: returned {result!r:.80}, want Stateful with a {kind.__name__}")
        self._state = result.state
        return result

    def save(self, folder: str) -> None:
        """Write the state into an existing folder."""
        (Path(folder) / STATE).write_bytes(msgspec.json.encode(self._state))

    def load(self, folder: str) -> None:
        """Go on with a saved state. Raises msgspec.ValidationError where it is another function's."""
        self._state = self._read((Path(folder) / STATE).read_bytes(), self._stage)

    @staticmethod
    def _read(saved: bytes, stage: Stage) -> msgspec.Struct | None:
        """A state as JSON, as one of a stage's."""
        return None if saved == b"null" else msgspec.json.decode(saved, type=stage.state)
