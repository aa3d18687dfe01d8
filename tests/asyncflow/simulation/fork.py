"""A copy of a world that goes on by itself: what changes is copied, what never changes is shared."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from copy import copy
from typing import Any

from asyncflow.control.prompt_book import PromptBook
from asyncflow.control.staleness import Admission
from asyncflow.placement.lease import PoolLease
from asyncflow.services.ended import EndedPrompts
from asyncflow.services.outbox import Outbox
from asyncflow.services.prompt_join import PromptJoin
from asyncflow.services.row_table import RowTable, _Row
from tests.asyncflow.simulation.controller import Controller, Training
from tests.asyncflow.simulation.generation import Engine, Running
from tests.asyncflow.simulation.network import Network
from tests.asyncflow.simulation.service import Service
from tests.asyncflow.simulation.stages import CallSite
from tests.asyncflow.simulation.watch import Watch
from tests.asyncflow.simulation.world import World

OURS = (World, Service, CallSite, Engine, Network, Controller, Watch)
REAL = (RowTable, PromptJoin, Outbox, EndedPrompts, Admission, PromptBook, PoolLease)
FIXED = ("_sources", "channels", "_by_prompt", "_place")  # set once


def fork(world: World) -> World:
    """A world in the same state, which shares nothing with this one that could still change."""
    return _copy(world, {})


def _copy(value: Any, done: dict[int, Any]) -> Any:
    """Containers, parts and state machines are copied; numbers, names, rows, messages and rules are as they are."""
    known = done.get(id(value))
    if known is not None:
        return known
    kind = type(value)
    if kind in _CONTAINERS:
        return _copy_container(value, kind, done)
    if kind is tuple:
        parts = tuple([item if type(item) in _SHARED else _copy(item, done) for item in value])
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
    if kind is _Row:
        row = done[id(value)] = _Row(value.attempt)
        row.slots = dict(value.slots)
        return row
    if issubclass(kind, Running | Training):
        made = done[id(value)] = copy(value)
        for field in value.__struct_fields__:
            setattr(made, field, _copy(getattr(value, field), done))
        return made
    if not issubclass(kind, OURS + REAL):
        _SHARED.add(kind)
        return value
    made = done[id(value)] = kind.__new__(kind)
    own: dict[str, Any] = vars(made)
    for name, item in value.__dict__.items():
        own[name] = item if type(item) in _SHARED or name in FIXED else _copy(item, done)
    return made


def _copy_container(value: Any, kind: type, done: dict[int, Any]) -> Any:
    made: Any = defaultdict(value.default_factory) if kind is defaultdict else kind()
    done[id(value)] = made
    if kind is set:
        made |= value
    elif kind in (list, deque):
        made.extend([item if type(item) in _SHARED else _copy(item, done) for item in value])
    else:
        for key, item in value.items():
            made[key] = item if type(item) in _SHARED else _copy(item, done)
    return made


_CONTAINERS = {dict, list, set, deque, defaultdict, Counter}
_SHARED: set[type] = {int, str, bool, float, type(None)}
