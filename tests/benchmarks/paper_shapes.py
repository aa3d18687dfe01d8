"""HybridFlow's placement results next to the mapper's, in the paper's setting and without fitted constants.

    python -m tests.benchmarks.paper_shapes

The paper's figures 12 and 13: which placement is best at which scale. Batches are divided evenly, as the paper's
training framework requires. So 96 devices together can't hold a 13B model, since 3 divides neither its heads, its
layers nor the batch. Where the mapper disagrees, the paper's kind of placement is also timed with free communication:
a better model of communication could not make it faster than that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from asyncflow.planner.costs import costs, memory
from asyncflow.planner.costs.devices import Cluster, Device
from asyncflow.planner.costs.set_costs import SetCosts
from asyncflow.planner.costs.shapes import LLAMA
from asyncflow.planner.costs.workload import ModelWork, ppo
from asyncflow.planner.search.mapper import Split, search
from protocols.layout.topology import Topology
from tests.asyncflow.planner.search.paper_setting import DEVICE, WORKLOAD, even

KINDS = {1: "together", 4: "standalone"}
MOST_PLACEMENTS = 15
CACHES = "here reading the caches takes most of the time, and is as fast with either size"
NEAR = 10  # points of a share that still count as the same

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
    """One result of the paper, and ours."""

    what: str
    paper: str
    ours: str
    agrees: bool
    why: str  # by how much, or why not


def placements() -> Iterator[Line]:
    """The best placement of every size at every scale."""
    for name, by_scale in PAPER.items():
        real, free = (
            SetCosts(MODELS[name], Cluster(device, max(by_scale)), WORKLOAD, allows=even)
            for device in (DEVICE, without_communication(DEVICE))
        )
        for devices, paper in by_scale.items():
            best = by_kind(real, devices)
            ours, split = next(iter(best.items()))
            why = ", ".join(f"{k} +{s.step_s / split.step_s - 1:.0%}" for k, s in best.items() if k != ours)
            if ours != paper:
                why += f"; with free communication, {paper} would take {by_kind(free, devices)[paper].step_s:.1f} s"
            best_text = f"{ours}, {split.step_s:.1f} s ({sets_of(split, real.models)})"
            yield Line(f"{name} on {devices}", paper, best_text, ours == paper, why)


def without_communication(device: Device) -> Device:
    """The same device with links and a network that take no time."""
    reach = msgspec.structs.replace(device.efficiency, link_latency_s=0.0, network_latency_s=0.0)
    return msgspec.structs.replace(device, link_bytes_per_s=1e18, network_bytes_per_s=1e18, efficiency=reach)


def by_kind(found: SetCosts, devices: int) -> dict[str, Split]:
    """The best placement of each kind, the best kind first."""
    table = {mask: rows[: devices + 1] for mask, rows in found.table.items()}
    best: dict[str, Split] = {}
    for split in search(table, len(found.models), devices, keep=MOST_PLACEMENTS):
        best.setdefault(KINDS.get(len(split.sets), "split"), split)
    return best


def sets_of(split: Split, models: Sequence[ModelWork]) -> str:
    """Models and their devices: "pol+ref 64/cri 32"."""
    return "/".join(
        "+".join(model.role[:3] for i, model in enumerate(models) if mask >> i & 1) + f" {count}"
        for mask, count in split.sets
    )


def generation_layouts() -> Iterator[Line]:
    """The tensor-parallel size to generate with on 16 devices, after training at 1-8-2."""
    topology = Topology(1, 8, 2)
    for name, paper, cut in (("7B", 2, "60 %"), ("13B", 4, "36 %")):
        shape, seconds = LLAMA[name], {}
        held = memory.footprint(ModelWork("policy", shape, 1, 0, True), topology, WORKLOAD, recompute=True)
        for tp in (1, 2, 4, 8):
            free = DEVICE.usable_bytes - held.resident - memory.generation_bytes(shape, topology, 1, tp)
            capacity = memory.kv_capacity(shape, 1, tp, free, WORKLOAD)
            generation = costs.generation_s(shape, 1, tp, 16 // tp, WORKLOAD.samples, capacity, WORKLOAD, DEVICE)
            seconds[tp] = generation.latency_s + costs.transition_s(shape, topology, 1, tp, DEVICE)
        best = min(seconds, key=lambda tp: seconds[tp])
        why = f"{1 - seconds[best] / seconds[8]:.0%} less generation time than with t_g = 8, in the paper {cut}: "
        yield Line(f"{name}: t_g on 16", str(paper), str(best), best == paper, why + CACHES)


def policy_share() -> Iterator[Line]:
    """Generation and the policy's training as a share of the iteration, everything together."""
    shares = {}
    for name in ("7B", "13B", "34B"):
        found = SetCosts(MODELS[name], Cluster(DEVICE, 64), WORKLOAD, allows=even)
        choice = found.chosen[(1 << len(found.models)) - 1][64]
        assert choice is not None
        own = next(own for model, _, own in found.parts(choice) if model.role == "policy")
        shares[name] = 100 * own.total_s / choice.total_s
    mean = statistics.fmean(shares.values())
    why = "together on 64: " + ", ".join(f"{name} {share:.0f} %" for name, share in shares.items())
    yield Line("policy's share of a step", "58.9 %", f"{mean:.0f} %", abs(mean - 58.9) <= NEAR, why)


def main() -> None:
    """Print the table."""
    lines = [*generation_layouts(), *policy_share(), *placements()]
    print("| | paper | ours | agrees | by how much, or why not |\n|---|---|---|---|---|")
    for line in lines:
        print(f"| {line.what} | {line.paper} | {line.ours} | {'yes' if line.agrees else 'no'} | {line.why} |")
    print(f"\n{sum(line.agrees for line in lines)} of {len(lines)} agree")


if __name__ == "__main__":
    main()
