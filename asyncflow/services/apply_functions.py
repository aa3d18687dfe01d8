"""The functions of a closing stage as a worker: its batch function, its filter, and the state between two batches.

The state moves when a batch is closed. A checkpoint is written between two steps only, so what it holds is the
state of its last committed step: a step that is given up takes the run back to a checkpoint, and the state with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from asyncflow.dataflow.graph import Stage
from protocols.stage import Stateful

STATE = "state.json"


class ApplyFunctions:
    """The worker of the advantage service; its methods have the functions' names."""

    def __init__(self, stage: Stage) -> None:
        assert stage.function is not None, f"{stage.name} closes no batch"
        self._name, self._function, self._kind = stage.name, stage.function, stage.state
        self._state: msgspec.Struct | None = None
        setattr(self, stage.method, stage.function if stage.state is None else self._carry)
        if stage.filter is not None:
            setattr(self, stage.filter.name, stage.filter.function)

    def _carry(self, *inputs: Any, **numbers: Any) -> Stateful[Any, Any]:
        """Call the batch function with the state that its last call returned. Raises TypeError where it returns none.

        Where the function raises the state stays as it was.
        """
        assert self._kind is not None
        result = self._function(*inputs, state=self._state, **numbers)
        if not isinstance(result, Stateful) or not isinstance(result.state, self._kind):
            raise TypeError(f"{self._name}: returned {result!r:.80}, want Stateful with a {self._kind.__name__}")
        self._state = result.state
        return result

    def save(self, folder: str) -> None:
        """Write the state into an existing folder."""
        (Path(folder) / STATE).write_bytes(msgspec.json.encode(self._state))

    def load(self, folder: str) -> None:
        """Go on with a saved state. Raises msgspec.ValidationError where it is another function's."""
        assert self._kind is not None
        saved = (Path(folder) / STATE).read_bytes()
        self._state = None if saved == b"null" else msgspec.json.decode(saved, type=self._kind)
