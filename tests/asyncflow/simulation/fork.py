"""An independent copy of a world: mutable parts are copied, immutable parts are shared."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from copy import copy
from typing import Any

from asyncflow.control.admission.inflight_prompts import InFlightPrompts
from asyncflow.control.admission.staleness import Admission
from asyncflow.control.device_lease import PoolLease
from asyncflow.services.channels.finished_prompts import FinishedPrompts
from asyncflow.services.channels.outbox import Outbox
from asyncflow.services.channels.prompt_join import PromptJoin
from asyncflow.services.channels.row_table import RowTable, _Row
from tests.asyncflow.simulation.controller import Controller, Training
from tests.asyncflow.simulation.generation import Engine, Running
from tests.asyncflow.simulation.network import Network
from tests.asyncflow.simulation.service import Service
from tests.asyncflow.simulation.stages import CallSite
from tests.asyncflow.simulation.turns import Turns
from tests.asyncflow.simulation.watch import Watch
from tests.asyncflow.simulation.world import World

OURS = (World, Service, CallSite, Engine, Network, Controller, Watch, Turns)
REAL = (RowTable, PromptJoin, Outbox, FinishedPrompts, Admission, InFlightPrompts, PoolLease)
FIXED = ("_sources", "channels", "_by_prompt", "_place")  # attributes that never change

Done = dict[int, Any]  # copies, by the id of what was copied


def fork(world: World) -> World:
    """A world in the same state that shares no mutable object with this one.

    Parts and state machines are copied once, however many objects refer to them; each container has one owner. The
    record of firings starts empty, because it belongs to one run and no event depends on it.
    """
    made = _part(world, {})
    made.watch.firings = defaultdict(list)
    return made


def _copy(value: Any, done: Done) -> Any:
    kind = type(value)
    how = _HOW.get(kind)
    if how is not None:
        return how(value, done)
    if issubclass(kind, OURS + REAL):
        _HOW[kind] = _part
        return _part(value, done)
    _SHARED.add(kind)  # numbers, names, rows, messages and rules are immutable
    return value


def _part(value: Any, done: Done) -> Any:
    made = done.get(id(value))
    if made is None:
        made = done[id(value)] = object.__new__(type(value))
        own = vars(made)
        for name, item in vars(value).items():
            own[name] = item if type(item) in _SHARED or name in FIXED else _copy(item, done)
    return made


def _struct(value: Any, done: Done) -> Any:
    made = copy(value)
    for field in value.__struct_fields__:
        setattr(made, field, _copy(getattr(value, field), done))
    return made


def _row(value: _Row[Any], done: Done) -> Any:
    made = _Row[Any](value.attempt)
    made.slots = dict(value.slots)
    return made


def _list(value: Any, done: Done) -> list[Any]:
    return [item if type(item) in _SHARED else _copy(item, done) for item in value]


def _dict(value: Any, done: Done) -> dict[Any, Any]:
    return {key: item if type(item) in _SHARED else _copy(item, done) for key, item in value.items()}


def _tuple(value: Any, done: Done) -> Any:
    parts = _list(value, done)
    return value if all(a is b for a, b in zip(parts, value, strict=True)) else tuple(parts)


def _counter(value: Any, done: Done) -> Any:
    made = Counter[Any]()
    dict.update(made, value)
    return made


_HOW: dict[type, Callable[[Any, Done], Any]] = {
    list: _list,
    dict: _dict,
    tuple: _tuple,
    set: lambda value, done: set(value),
    deque: lambda value, done: deque(_list(value, done)),
    defaultdict: lambda value, done: defaultdict(value.default_factory, _dict(value, done)),
    Counter: _counter,
    _Row: _row,
    Running: _struct,
    Training: _struct,
}
_SHARED: set[type] = {int, str, bool, float, type(None)}
