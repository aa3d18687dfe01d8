"""HybridFlow's placement results beside the mapper's, in the paper's setting and with no constant of their own.

    python -m tests.benchmarks.paper_shapes

The paper's figures 12 and 13: which placement is best at which scale. A second line allows two pipeline stages at
most (four for 34B, which needs them): pipelines across machines spare the exchange of gradients, which is what makes
everything together slow there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from asyncflow.placement import costs, memory
from asyncflow.placement.devices import Refused
from asyncflow.placement.layouts import SetCosts
from asyncflow.placement.mapper import Split, search
from asyncflow.placement.shapes import LLAMA
from asyncflow.placement.workload import ModelWork, ppo
from protocols.topology import Topology
from tests.asyncflow.placement.paper_setting import DEVICE, WORKLOAD, cluster

SCALES = (16, 32, 64, 96, 128)
KINDS = {1: "together", 4: "standalone"}
MOST_PLACEMENTS = 15

PAPER: dict[str, Mapping[int, str]] = {
    "7B": {16: "together", 32: "together", 64: "together"},
    "13B": {16: "together", 32: "together", 64: "together", 96: "split", 128: "standalone"},
    "34B": {32: "together", 64: "together", 96: "split", 128: "split"},
    "13B, 70B critic and reward": {64: "together", 96: "split", 128: "split"},
}
MODELS: dict[str, Sequence[ModelWork]] = {
    "7B": ppo(LLAMA["7B"]),
    "13B": ppo(LLAMA["13B"]),
    "34B": ppo(LLAMA["34B"]),
    "13B, 70B critic and reward": ppo(LLAMA["13B"], LLAMA["70B"]),
}


class Line(msgspec.Struct, frozen=True):
    """One result of the paper's and ours."""

    what: str
    paper: str
    ours: str
    shallow: str = ""  # ours with two pipeline stages at most

    @property
    def agrees(self) -> str:
        """Whether ours begins with the paper's word."""
        return "yes" if self.ours.startswith(self.paper) else "shallow" if self.shallow.startswith(self.paper) else "no"


def placements() -> Iterator[Line]:
    """The best placement of every size at every scale."""
    for name, by_scale in PAPER.items():
        deep, shallow = (
            SetCosts(MODELS[name], cluster(max(by_scale)), WORKLOAD, allows=lambda m, t, most=most: t.pp <= most)
            for most in (1 << 20, 2 if name != "34B" else 4)
        )
        for devices, paper in by_scale.items():
            yield Line(f"{name} on {devices}", paper, told(deep, devices), told(shallow, devices))


def told(found: SetCosts, devices: int) -> str:
    """The best placement, and how far the best of each other kind is behind it."""
    table = {mask: rows[: devices + 1] for mask, rows in found.table.items()}
    try:
        ranked = search(table, len(found.models), devices, 0, MOST_PLACEMENTS)
    except Refused:
        return "does not fit"
    behind: dict[str, float] = {}
    for split in ranked:
        behind.setdefault(kind(split), split.step_s / ranked[0].step_s - 1)
    best = "/".join(
        "+".join(model.role[:3] for i, model in enumerate(found.models) if mask >> i & 1) + f" {count}"
        for mask, count in ranked[0].sets
    )
    others = ", ".join(f"{name} {late:+.0%}" for name, late in behind.items() if late)
    return f"{kind(ranked[0])} ({best}; {others})"


def kind(split: Split) -> str:
    """together, split or standalone."""
    return KINDS.get(len(split.sets), "split")


def generation_layouts() -> Iterator[Line]:
    """The tensor-parallel size to generate with on 16 devices, after training at 1-8-2."""
    topology = Topology(1, 8, 2)
    for name, paper in (("7B", "2"), ("13B", "4")):
        shape, seconds = LLAMA[name], {}
        held = memory.footprint(ModelWork("policy", shape, 1, 0, True), topology, WORKLOAD, recompute=True)
        for tp in (1, 2, 4, 8):
            free = DEVICE.usable_bytes - held.resident - memory.generation_bytes(shape, topology, 1, tp)
            capacity = memory.kv_capacity(shape, 1, tp, free, WORKLOAD)
            drawn = costs.generation_s(shape, 1, tp, 16 // tp, WORKLOAD.samples, capacity, WORKLOAD, DEVICE)
            seconds[tp] = drawn.latency_s + costs.transition_s(shape, topology, 1, tp, DEVICE)
        best = min(seconds, key=lambda tp: seconds[tp])
        cut = 1 - seconds[best] / seconds[8]
        yield Line(f"{name}: t_g on 16", paper, f"{best}, which cuts generation by {cut:.0%} against 8")


def policy_share() -> Iterator[Line]:
    """Generation and the policy's training as a share of the iteration, everything together on 64 devices."""
    for name in ("7B", "13B", "34B"):
        found = SetCosts(MODELS[name], cluster(64), WORKLOAD)
        choice = found.chosen[(1 << len(found.models)) - 1][64]
        assert choice is not None
        own = next(own for model, _, own in found.parts(choice) if model.role == "policy")
        yield Line(f"{name}: policy's share", "59 %", f"{100 * own.total_s / choice.total_s:.0f} %")


def main() -> None:
    """Print the table."""
    for lines in (generation_layouts(), policy_share(), placements()):
        for line in lines:
            print(f"{line.what:<34} paper: {line.paper:<11} ours: {line.ours}")
            if line.shallow:
                print(f"{'':<34} with shallow pipelines: {line.shallow} [agrees: {line.agrees}]")


if __name__ == "__main__":
    main()
