"""The dataflow graph: stages (call sites) and the typed channels between them, checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from typing import Any

import msgspec

from protocols.data.columns import Batch
from protocols.data.messages import Metrics
from protocols.stage import Grain

SOURCE = "prompts"  # the one source: the controller's admitted prompts


class DataflowError(Exception):
    """An algorithm that can't be run as it is written; the message names the stage and its inputs."""


class Filter(msgspec.Struct, frozen=True):
    """Which complete prompts are trainable, decided from the rows of one prompt at a time."""

    function: Callable[..., Any]  # rows of the inputs -> [N] bool; a prompt without a True is dropped
    inputs: tuple[int, ...]  # positions of its arguments among the stage's inputs

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__


class Stage(msgspec.Struct, frozen=True):
    """One call site of a service's method, or of an `apply` function."""

    name: str  # "policy.generate#1", "gae#1"
    service: str  # the service that runs it: a role, or ADVANTAGE for apply functions
    method: str
    consumes: tuple[type[Batch], ...]
    produces: type[Batch] | type[Metrics]
    inputs: tuple[str, ...]  # names of the stages (or SOURCE) that it reads, by position
    grain: Grain
    protocol: str
    greedy: bool = False
    function: Callable[..., Any] | None = None  # of an apply stage
    filter: Filter | None = None  # of an apply stage that trains only some prompts
    state: type[msgspec.Struct] | None = None  # of an apply stage that carries state from batch to batch

    @property
    def is_sink(self) -> bool:
        """Whether it trains on a closed batch; it has no output."""
        return self.produces is Metrics

    @property
    def generates(self) -> bool:
        """Whether it generates rollouts from admitted prompts."""
        return self.inputs == (SOURCE,)

    @property
    def closes(self) -> bool:
        """Whether it joins rows and fires on the closed batch."""
        return self.function is not None


ADVANTAGE = "advantage"  # the service that runs apply functions, on a CPU rank of its own


class ChannelSpec(msgspec.Struct, frozen=True):
    """A typed edge of the graph: rows of one message type from a stage to one input of another."""

    source: str
    destination: str
    position: int
    message: type[Batch]
    grain: Grain
    protocol: str  # the transfer protocol by which the destination's ranks read the rows

    @property
    def edge(self) -> str:
        """Its name in deliveries: destination stage and input position."""
        return f"{self.destination}.{self.position}"


class Dataflow(msgspec.Struct, frozen=True):
    """A checked algorithm."""

    name: str
    stages: tuple[Stage, ...]
    channels: tuple[ChannelSpec, ...]

    def stage(self, name: str) -> Stage:
        """The stage with this name. Raises KeyError."""
        return {s.name: s for s in self.stages}[name]

    def stages_of(self, service: str) -> list[Stage]:
        """The stages that a service runs, in the order of the algorithm."""
        return [s for s in self.stages if s.service == service]

    def consumers(self, source: str) -> list[ChannelSpec]:
        """The channels from a stage (or SOURCE)."""
        return [c for c in self.channels if c.source == source]

    def inputs_of(self, stage: str) -> list[ChannelSpec]:
        """The channels to a stage, by position."""
        return sorted((c for c in self.channels if c.destination == stage), key=lambda c: c.position)

    @property
    def services(self) -> list[str]:
        """Services in the order in which the algorithm first calls them."""
        return list(dict.fromkeys(s.service for s in self.stages))

    @property
    def sinks(self) -> list[Stage]:
        """The stages that train."""
        return [s for s in self.stages if s.is_sink]

    @property
    def batch_stage(self) -> Stage:
        """The stage that turns a closed batch into experience."""
        return next(s for s in self.stages if s.closes)

    def draw(self) -> str:
        """The graph as text: a line per stage with its inputs and its output."""
        width = max(len(s.name) for s in self.stages)
        lines = []
        for stage in self.stages:
            output = "" if stage.is_sink else f" -> {stage.produces.__name__}"
            condition = f", where {stage.filter.name}" if stage.filter is not None else ""
            how = f"[{stage.grain}, {stage.protocol}{condition}]"
            lines.append(f"{stage.name:<{width}}  <- {', '.join(stage.inputs)}{output}   {how}")
        return "\n".join(lines)


def check(name: str, stages: tuple[Stage, ...]) -> Dataflow:
    """Type-check the wiring and derive the channels. Raises DataflowError."""
    by_name = {s.name: s for s in stages}
    try:
        TopologicalSorter({s.name: [i for i in s.inputs if i != SOURCE] for s in stages}).prepare()
    except CycleError as error:
        raise DataflowError(f"{name}: the stages form a cycle: {' -> '.join(error.args[1])}") from None
    if not any(s.service == "policy" and s.is_sink for s in stages):
        raise DataflowError(f"{name}: nothing calls flow.policy.update, so nothing would be trained")
    batch_stages = [s.name for s in stages if s.closes]
    if len(batch_stages) != 1:
        raise DataflowError(f"{name}: wants exactly one join(...).apply(...) that forms the batch, has {batch_stages}")
    read = {i for s in stages for i in s.inputs}
    for stage in stages:
        if not stage.is_sink and stage.name not in read:
            raise DataflowError(
                f"{name}: nobody reads the {stage.produces.__name__} of {stage.name}: its rows would be held for ever"
            )
        for source in stage.inputs:
            if source != SOURCE and source not in by_name:
                raise DataflowError(f"{name}: {stage.name} reads {source}, which is no stage of this algorithm")
            if stage.is_sink and (source == SOURCE or not by_name[source].closes):
                raise DataflowError(f"{name}: {stage.name} trains on a closed batch, but {source} gives single rows")
            if not stage.is_sink and source != SOURCE and by_name[source].closes:
                raise DataflowError(f"{name}: {stage.name} takes single rows, but {source} gives a closed batch")
    channels = tuple(
        ChannelSpec(
            source=source,
            destination=stage.name,
            position=position,
            message=kind,
            grain=by_name[source].grain if source != SOURCE else stage.grain,
            protocol=stage.protocol,
        )
        for stage in stages
        for position, (source, kind) in enumerate(zip(stage.inputs, stage.consumes, strict=True))
    )
    return Dataflow(name, stages, channels)
