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
from multiprocessing.connection import Connection

import msgspec
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from asyncflow.bench.report import BenchRow, Measured
from asyncflow.recipe.config import BadInput
from protocols.layout.topology import GenerationGrouping, Style, Topology
from workers.parallel.model import ParallelModel, plan_of
from workers.parallel.plan import Parameter, ShardPlan
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.resharding.plan import transition

STYLES: tuple[Style, ...] = ("deepspeed", "vanilla", "hybridflow")
NAMES: dict[Style, str] = {"deepspeed": "full gather", "vanilla": "vanilla", "hybridflow": "hybridflow"}
_ANY_BUCKET = 1 << 40  # elements; the bucket size does not change what is moved
COLLECTIVE_TIMEOUT = timedelta(minutes=5)  # for one collective, and for one round of all ranks


class TransitionBenchSizes(msgspec.Struct, frozen=True):
    """How much is measured. The model is a Llama in float32; the defaults make one of 85 MB."""

    rounds: int = 9
    layers: int = 8
    heads: int = 8  # as many key-value heads
    hidden: int = 512
    intermediate: int = 1024
    vocabulary: int = 256
    bucket_bytes: int = 8 << 20  # of one collective
    copied_bytes: int = 32 << 20  # by each rank, to measure the bandwidth


QUICK = TransitionBenchSizes(rounds=1, layers=4, hidden=64, intermediate=128, copied_bytes=1 << 20)


class StyleFigures(msgspec.Struct, frozen=True):
    """The figures of one way. Bytes are of the worst rank, seconds are medians of rounds."""

    style: Style
    received_bytes: int
    received_matrices_bytes: int  # of the matrices that the formula covers
    formula_bytes: int  # the paper's table 2, rounded
    multiple: str  # received_matrices_bytes over M, exact, as "1/4"
    peak_bytes: int  # parameters and bucket
    generation_bytes: int  # of the generation shard
    redundant_bytes: int  # of the training shard, where it is not part of the generation shard
    seconds: float
    return_seconds: float  # back to the training layout, which sends nothing
    speedup: float  # over the full gather, to generation
    round_speedup: float  # over the full gather, to generation and back
    bandwidth_share: float  # of what all ranks together copy in memory


class TransitionFigures(msgspec.Struct, frozen=True):
    """All figures of one run."""

    train: str
    generate: str
    model_bytes: int
    bucket_bytes: int
    matrices_bytes: int  # M: the sharded matrices; with several stages, those of the layers
    copy_gigabytes_per_second: float  # of all ranks together
    styles: list[StyleFigures]


class RankTimings(msgspec.Struct, frozen=True):
    """What one rank measured."""

    copy_seconds: float
    transitions: dict[str, list[Transition]]  # by style, a round each
    return_seconds: dict[str, list[float]]  # by style, back to the training layout


def run(*, quick: bool, train: str, generate: str) -> Measured:
    """The benchmark, as the command line runs it. Raises BadInput for layouts that don't fit."""
    try:
        figures = measure(train, generate, QUICK if quick else TransitionBenchSizes())
    except ValueError as error:
        raise BadInput(str(error)) from None
    return Measured(rows(figures), lines(figures))


def measure(train: str, generate: str, sizes: TransitionBenchSizes) -> TransitionFigures:
    """Save a model, start a process for every rank of `train`, and measure.

    Raises ValueError, before any process starts, where the layouts fit neither each other nor the model.
    """
    groupings = {style: grouping_of(train, generate, style) for style in STYLES}
    topology, config = groupings["hybridflow"].topology, _config(sizes)
    plan = plan_of(config, topology)
    for grouping in groupings.values():
        transition(plan, grouping, 0, _ANY_BUCKET)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        ranks = _run(folder, train, generate, sizes)
    copied = topology.world_size * sizes.copied_bytes / max(rank.copy_seconds for rank in ranks)
    return TransitionFigures(
        train=train,
        generate=generate,
        model_bytes=_bytes(p for stage in range(plan.pp) for p in plan.parameters(stage)),
        bucket_bytes=sizes.bucket_bytes,
        matrices_bytes=_matrices_bytes(plan),
        copy_gigabytes_per_second=copied / 1e9,
        styles=[_figures(grouping, plan, ranks, copied) for grouping in groupings.values()],
    )


def lines(figures: TransitionFigures) -> list[str]:
    """The figures as text, each next to its bound."""
    found = [
        f"{figures.train} -> {figures.generate}, a model of {figures.model_bytes / 1e6:.1f} MB,"
        f" M = {figures.matrices_bytes / 1e6:.1f} MB of matrices, buckets of {figures.bucket_bytes / 1e6:.1f} MB;"
        f" all ranks copy {figures.copy_gigabytes_per_second:.1f} GB/s"
    ]
    for of in figures.styles:
        formula = of.formula_bytes / figures.matrices_bytes
        found += [
            f"{NAMES[of.style]:<11}  {of.seconds * 1e3:.0f} ms, and {of.return_seconds * 1e3:.0f} ms back:"
            f" {of.speedup:.2f} x as fast as the full gather, {of.round_speedup:.2f} x there and back,"
            f" {of.bandwidth_share:.0%} of copying memory",
            f"             received {of.received_bytes / 1e6:.2f} MB a rank: {of.multiple} M"
            f" (formula {formula:.4g} M)"
            f" and {(of.received_bytes - of.received_matrices_bytes) / 1e6:.2f} MB beside the matrices;"
            f" peak {of.peak_bytes / 1e6:.1f} MB for {of.generation_bytes / 1e6:.1f} MB"
            f" to generate with, {of.redundant_bytes / 1e6:.1f} MB redundant",
        ]
    return found


def rows(figures: TransitionFigures) -> list[BenchRow]:
    """The figures as rows; the full gather is the peer."""
    full = next(of for of in figures.styles if of.style == "deepspeed")
    found = []
    for of in figures.styles:
        name, both = NAMES[of.style], of.seconds + of.return_seconds
        found += [
            BenchRow(f"{name}: received a rank", of.received_matrices_bytes, "bytes", bound=of.formula_bytes),
            BenchRow(f"{name}: peak", of.peak_bytes, "bytes", peer=full.peak_bytes, bound=of.generation_bytes),
            BenchRow(f"{name}: to generation", of.seconds, "s", peer=full.seconds, ratio=of.speedup),
            BenchRow(
                f"{name}: there and back", both, "s", peer=full.seconds + full.return_seconds, ratio=of.round_speedup
            ),
        ]
    return found


def grouping_of(train: str, generate: str, style: Style) -> GenerationGrouping:
    """The ranks of layout "p-t-d" as they generate in layout "p_g-t_g". Raises ValueError where that is impossible."""
    at = Topology.parse(generate)
    if at.dp != 1:
        raise ValueError(f"generation layout {generate!r}: write p_g-t_g; the replicas follow from the training layout")
    return GenerationGrouping(Topology.parse(train), at.pp, at.tp, style)


# --- from the ranks' measurements to figures


def _figures(grouping: GenerationGrouping, plan: ShardPlan, ranks: list[RankTimings], copied: float) -> StyleFigures:
    style = grouping.style
    seen = [rank.transitions[style][-1] for rank in ranks]
    matrices, m = max(_received_matrices_bytes(plan, grouping, r) for r in range(len(ranks))), _matrices_bytes(plan)
    seconds, back, full = _seconds(ranks, style), _return_seconds(ranks, style), _seconds(ranks, "deepspeed")
    return StyleFigures(
        style=style,
        received_bytes=max(one.received_bytes for one in seen),
        received_matrices_bytes=matrices,
        formula_bytes=round(grouping.received_bytes(m)),
        multiple=str(Fraction(matrices, m)),
        peak_bytes=max(one.peak_bytes for one in seen),
        generation_bytes=max(one.generation_bytes for one in seen),
        redundant_bytes=max(one.redundant_bytes for one in seen),
        seconds=seconds,
        return_seconds=back,
        speedup=full / seconds,
        round_speedup=(full + _return_seconds(ranks, "deepspeed")) / (seconds + back),
        bandwidth_share=sum(one.received_bytes for one in seen) / seconds / copied,
    )


def _seconds(ranks: list[RankTimings], style: Style) -> float:
    rounds = zip(*(rank.transitions[style] for rank in ranks), strict=True)
    return statistics.median(max(one.seconds for one in of_ranks) for of_ranks in rounds)


def _return_seconds(ranks: list[RankTimings], style: Style) -> float:
    rounds = zip(*(rank.return_seconds[style] for rank in ranks), strict=True)
    return statistics.median(map(max, rounds))


def _received_matrices_bytes(plan: ShardPlan, grouping: GenerationGrouping, rank: int) -> int:
    """Bytes of the formula's matrices that the collectives bring to a rank."""
    names = {parameter.name for parameter in _matrices(plan)}
    itemsize = torch.float32.itemsize
    return itemsize * sum(
        piece.elements
        for move in transition(plan, grouping, rank, _ANY_BUCKET)
        for owner, pieces in zip(move.owners, move.pieces, strict=True)
        for piece in pieces
        if owner != rank and piece.name in names
    )


def _matrices_bytes(plan: ShardPlan) -> int:
    return _bytes(_matrices(plan))


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
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        tie_word_embeddings=False,
    )


# --- the ranks


def _run(folder: str, train: str, generate: str, sizes: TransitionBenchSizes) -> list[RankTimings]:
    """Every rank in a process of its own, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pipes, processes = [], []
    try:
        for rank in range(Topology.parse(train).world_size):
            own, theirs = context.Pipe(duplex=False)
            arguments = (theirs, rank, folder, train, generate, msgspec.json.encode(sizes))
            process = context.Process(target=_rank, args=arguments, daemon=True, name=f"bench-rank-{rank}")
            process.start()
            theirs.close()
            pipes.append(own)
            processes.append(process)
        answers = [_answer(pipe, rank, sizes) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join(COLLECTIVE_TIMEOUT.total_seconds())
        return answers
    finally:  # where a rank has failed, the others wait for it
        for process in processes:
            process.terminate()
            process.join()


def _answer(pipe: Connection, rank: int, sizes: TransitionBenchSizes) -> RankTimings:
    limit = COLLECTIVE_TIMEOUT * (sizes.rounds + 1)
    if not pipe.poll(limit.total_seconds()):
        raise RuntimeError(f"rank {rank} of the benchmark: no figures within {limit}")
    try:
        return msgspec.json.decode(pipe.recv_bytes(), type=RankTimings)
    except EOFError:
        raise RuntimeError(f"rank {rank} of the benchmark ended early; its error stands above") from None


def _rank(pipe: Connection, rank: int, folder: str, train: str, generate: str, encoded: bytes) -> None:
    """One rank's process, from its start to its figures."""
    torch.set_num_threads(1)
    sizes = msgspec.json.decode(encoded, type=TransitionBenchSizes)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks what the host's name resolves to
    topology = Topology.parse(train)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=topology.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    model = ParallelModel(folder, topology, timeout=COLLECTIVE_TIMEOUT)
    engines = {
        style: HybridEngine(model, grouping_of(train, generate, style), bucket_bytes=sizes.bucket_bytes)
        for style in STYLES
    }
    copy_seconds = min(_copy_seconds(sizes.copied_bytes) for _ in range(3))
    transitions: dict[str, list[Transition]] = {style: [] for style in STYLES}
    return_seconds: dict[str, list[float]] = {style: [] for style in STYLES}
    for number in range(sizes.rounds + 1):
        for style in STYLES:
            dist.barrier()
            seen = engines[style].to_generation()
            start = time.perf_counter()
            engines[style].to_training()
            if number:  # the first allocates what later ones find warm
                transitions[style].append(seen)
                return_seconds[style].append(time.perf_counter() - start)
    pipe.send_bytes(msgspec.json.encode(RankTimings(copy_seconds, transitions, return_seconds)))
    dist.barrier()  # nobody leaves while another still measures
    dist.destroy_process_group()


def _copy_seconds(nbytes: int) -> float:
    """What copying so many bytes takes this rank while all others do the same."""
    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    dist.barrier()
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started
