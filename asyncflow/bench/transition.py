"""`asyncflow bench transition`: the paper's three ways from the training layout to a generation layout, side by side.

    full gather   DeepSpeed-Chat: every rank gathers the model from all ranks and keeps its part
    vanilla       HybridFlow-V: every rank gathers the model from its replica and keeps its part
    hybridflow    every rank gathers its generation shard around the training shard that it already holds

Each rank is a process on gloo. Rounds of the three ways are interleaved, so that a disturbance hits all of them; a
round ends when its slowest rank does; medians are reported. The bound is the memory copy speed of all ranks together,
measured in the same run.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from asyncflow.bench.memory_copy import copy_speed
from asyncflow.bench.report import BenchRow, Measured
from asyncflow.recipe.config import BadInput
from protocols.layout.topology import GenerationGrouping, Style, Topology
from workers.parallel.model import ParallelModel, plan_of
from workers.parallel.plan import Parameter, ShardPlan
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.resharding.plan import transition

NAMES: dict[Style, str] = {"deepspeed": "full gather", "vanilla": "vanilla", "hybridflow": "hybridflow"}
BUCKET_BYTES = 8 << 20  # of one collective
_ANY_BUCKET = 1 << 40  # elements; the bucket size does not change what is moved
COLLECTIVE_TIMEOUT = timedelta(minutes=5)  # for one collective, and for one round of all ranks


class TransitionBenchSizes(msgspec.Struct, frozen=True):
    """How much is measured. The model is a Llama in float32; the defaults make one of 85 MB."""

    rounds: int = 9
    layers: int = 8
    hidden: int = 512


QUICK = TransitionBenchSizes(rounds=1, layers=4, hidden=64)


class StyleFigures(msgspec.Struct, frozen=True):
    """The figures of one way. Bytes are of the worst rank, seconds are medians of rounds."""

    style: Style
    received_bytes: int
    received_matrices_bytes: int  # of the matrices that the formula covers
    formula_bytes: int  # the paper's table 2, rounded
    peak_bytes: int  # parameters and bucket
    generation_bytes: int  # of the generation shard
    redundant_bytes: int  # of the training shard, where it is not part of the generation shard
    seconds: float
    return_seconds: float  # back to the training layout, which sends nothing
    bandwidth_share: float  # of what all ranks together copy in memory


class TransitionFigures(msgspec.Struct, frozen=True):
    """All figures of one run."""

    model_bytes: int
    matrices_bytes: int  # M: the sharded matrices; with several stages, those of the layers
    copy_speed: float  # bytes per second of all ranks together
    styles: list[StyleFigures]  # the full gather first


class RankTimings(msgspec.Struct, frozen=True):
    """What one rank measured, by style."""

    copy_speed: float
    last: dict[str, Transition]
    seconds: dict[str, list[float]]  # of each round, to generation
    return_seconds: dict[str, list[float]]  # of each round, back to the training layout


def run(*, quick: bool, train: str, generate: str) -> Measured:
    """The benchmark, as the command line runs it. Raises BadInput for layouts that don't fit."""
    try:
        figures = measure(train, generate, QUICK if quick else TransitionBenchSizes())
    except ValueError as error:
        raise BadInput(str(error)) from None
    return measured(f"{train} -> {generate}", figures)


def measure(train: str, generate: str, sizes: TransitionBenchSizes) -> TransitionFigures:
    """Save a model, start a process for every rank of `train`, and measure.

    Raises ValueError, before any process starts, where the layouts fit neither each other nor the model.
    """
    groupings = [grouping_of(train, generate, style) for style in NAMES]
    topology, config = Topology.parse(train), _config(sizes)
    plan = plan_of(config, topology)
    for grouping in groupings:
        transition(plan, grouping, 0, _ANY_BUCKET)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        ranks = _run(folder, train, generate, sizes.rounds)
    copied = topology.world_size * min(rank.copy_speed for rank in ranks)
    return TransitionFigures(
        model_bytes=_bytes(p for stage in range(plan.pp) for p in plan.parameters(stage)),
        matrices_bytes=_bytes(_matrices(plan)),
        copy_speed=copied,
        styles=[_figures(grouping, plan, ranks, copied) for grouping in groupings],
    )


def measured(layouts: str, figures: TransitionFigures) -> Measured:
    """The figures as rows, with the full gather as the peer, and as text."""
    full, matrices_bytes, rows = figures.styles[0], figures.matrices_bytes, list[BenchRow]()
    lines = [
        f"{layouts}, a model of {figures.model_bytes / 1e6:.1f} MB, M = {matrices_bytes / 1e6:.1f} MB of matrices,"
        f" buckets of {BUCKET_BYTES / 1e6:.1f} MB; all ranks copy {figures.copy_speed / 1e9:.1f} GB/s"
    ]
    for of in figures.styles:
        name, both, full_both = NAMES[of.style], of.seconds + of.return_seconds, full.seconds + full.return_seconds
        speedup, round_speedup = full.seconds / of.seconds, full_both / both
        rows += [
            BenchRow(f"{name}: received a rank", of.received_matrices_bytes, "bytes", bound=of.formula_bytes),
            BenchRow(f"{name}: peak", of.peak_bytes, "bytes", peer=full.peak_bytes, bound=of.generation_bytes),
            BenchRow(f"{name}: to generation", of.seconds, "s", peer=full.seconds, ratio=speedup),
            BenchRow(f"{name}: there and back", both, "s", peer=full_both, ratio=round_speedup),
        ]
        lines += [
            f"{name:<11}  {of.seconds * 1e3:.0f} ms, and {of.return_seconds * 1e3:.0f} ms back:"
            f" {speedup:.2f} x as fast as the full gather, {round_speedup:.2f} x there and back,"
            f" {of.bandwidth_share:.0%} of copying memory",
            f"             received {of.received_bytes / 1e6:.2f} MB a rank:"
            f" {Fraction(of.received_matrices_bytes, matrices_bytes)} M"
            f" (formula {of.formula_bytes / matrices_bytes:.4g} M)"
            f" and {(of.received_bytes - of.received_matrices_bytes) / 1e6:.2f} MB beside the matrices;"
            f" peak {of.peak_bytes / 1e6:.1f} MB for {of.generation_bytes / 1e6:.1f} MB"
            f" to generate with, {of.redundant_bytes / 1e6:.1f} MB redundant",
        ]
    return Measured(rows, lines)


def grouping_of(train: str, generate: str, style: Style) -> GenerationGrouping:
    """The ranks of layout "p-t-d" as they generate in layout "p_g-t_g". Raises ValueError where that is impossible."""
    at = Topology.parse(generate)
    if at.dp != 1:
        raise ValueError(f"generation layout {generate!r}: write p_g-t_g; the replicas follow from the training layout")
    return GenerationGrouping(Topology.parse(train), at.pp, at.tp, style)


# --- from the ranks' measurements to figures


def _figures(grouping: GenerationGrouping, plan: ShardPlan, ranks: list[RankTimings], copied: float) -> StyleFigures:
    style = grouping.style
    last = [rank.last[style] for rank in ranks]
    seconds = _median_of_slowest([rank.seconds[style] for rank in ranks])
    return StyleFigures(
        style=style,
        received_bytes=max(one.received_bytes for one in last),
        received_matrices_bytes=max(_received_matrices_bytes(plan, grouping, r) for r in range(len(ranks))),
        formula_bytes=round(grouping.received_bytes(_bytes(_matrices(plan)))),
        peak_bytes=max(one.peak_bytes for one in last),
        generation_bytes=max(one.generation_bytes for one in last),
        redundant_bytes=max(one.redundant_bytes for one in last),
        seconds=seconds,
        return_seconds=_median_of_slowest([rank.return_seconds[style] for rank in ranks]),
        bandwidth_share=sum(one.received_bytes for one in last) / seconds / copied,
    )


def _median_of_slowest(rounds_by_rank: list[list[float]]) -> float:
    return statistics.median(map(max, zip(*rounds_by_rank, strict=True)))


def _received_matrices_bytes(plan: ShardPlan, grouping: GenerationGrouping, rank: int) -> int:
    """Bytes of the formula's matrices that the collectives bring to a rank."""
    names = {parameter.name for parameter in _matrices(plan)}
    itemsize = torch.float32.itemsize
    return itemsize * sum(
        part.elements
        for move in transition(plan, grouping, rank, _ANY_BUCKET)
        for owner, slices in zip(move.owners, move.slices, strict=True)
        for part in slices
        if owner != rank and part.name in names
    )


def _matrices(plan: ShardPlan) -> Iterator[Parameter]:
    """The matrices that the formula covers: those that are sharded and that every stage has equally many of."""
    for stage in range(plan.pp):
        for parameter in plan.parameters(stage):
            if parameter.cut is not None and (plan.pp == 1 or parameter.name.startswith("model.layers.")):
                yield parameter


def _bytes(parameters: Iterator[Parameter]) -> int:
    return torch.float32.itemsize * sum(parameter.elements for parameter in parameters)


def _config(sizes: TransitionBenchSizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


# --- the ranks


def _run(folder: str, train: str, generate: str, rounds: int) -> list[RankTimings]:
    """Run every rank in a process of its own, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    files = [Path(folder, f"rank-{rank}.json") for rank in range(Topology.parse(train).world_size)]
    processes = [
        context.Process(
            target=_rank, args=(file, rank, folder, train, generate, rounds), daemon=True, name=f"bench-rank-{rank}"
        )
        for rank, file in enumerate(files)
    ]
    limit = COLLECTIVE_TIMEOUT * (rounds + 1)
    for process in processes:
        process.start()
    try:
        for rank, process in enumerate(processes):
            process.join(limit.total_seconds())
            if process.exitcode is None:
                raise RuntimeError(f"rank {rank} of the benchmark: no figures within {limit}")
            if process.exitcode != 0:
                raise RuntimeError(f"rank {rank} of the benchmark ended early; its error is printed above")
    finally:  # where a rank has failed, the others wait for it
        for process in processes:
            process.terminate()
            process.join()
    return [msgspec.json.decode(file.read_bytes(), type=RankTimings) for file in files]


def _rank(file: Path, rank: int, folder: str, train: str, generate: str, rounds: int) -> None:
    """Measure in one rank's process and write its timings to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks what the host's name resolves to
    topology = Topology.parse(train)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=topology.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    model = ParallelModel(folder, topology)
    engines = {
        style: HybridEngine(model, grouping_of(train, generate, style), bucket_bytes=BUCKET_BYTES) for style in NAMES
    }
    timings = RankTimings(copy_speed(dist.barrier), {}, {style: [] for style in NAMES}, {style: [] for style in NAMES})
    for number in range(rounds + 1):
        for style, engine in engines.items():
            dist.barrier()
            timings.last[style] = engine.to_generation()
            start = time.perf_counter()
            engine.to_training()
            if number:  # the first allocates what later ones find warm
                timings.seconds[style].append(timings.last[style].seconds)
                timings.return_seconds[style].append(time.perf_counter() - start)
    file.write_bytes(msgspec.json.encode(timings))
    dist.barrier()  # nobody leaves while another still measures
    dist.destroy_process_group()
