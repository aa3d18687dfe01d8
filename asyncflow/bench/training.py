"""What a training step computes and holds: the head in chunks against all logits, sorted rows against rows in order.

Memory is the peak of a process that takes one step, less what it holds without one. Tokens per second are those of
real tokens in forward and backward passes, on lengths whose 99th percentile is about eight times their median; the
two cuts take turns in one process. The bound of their ratio is that nothing is computed for padding.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from asyncflow.bench.report import BenchRow, Measured
from asyncflow.bench.training_step import StepMemory
from workers.data.token_rows import TokenRows
from workers.parallel.backends import trained_model
from workers.parallel.model import ParallelModel
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Model
from workers.training.micro_batches import micro_batch_rows
from workers.training.models import response_log_probs
from workers.training.outputs import chunk_of

LARGE_VOCABULARY = 151_936
MEGA = 1e6


def run(*, quick: bool, model: Path, rows: int, tokens: int, budget: int) -> Measured:
    """`model`: a folder, or none for a small random model with a vocabulary of 151,936."""
    with tempfile.TemporaryDirectory() as folder:
        parts: list[Measured] = []
        if model.name:
            parts.append(_memory(model, rows, tokens))
        else:
            large = _random(Path(folder) / "large", LARGE_VOCABULARY, hidden=64, layers=2)
            parts.append(_memory(large, 1 if quick else rows, tokens))
        small = _random(Path(folder) / "small", 512, hidden=128, layers=4)
        parts.append(_speed(small, 32 if quick else 256, budget, rounds=2 if quick else 5))
        return Measured.joined(parts)


def _memory(folder: Path, rows: int, tokens: int) -> Measured:
    vocabulary = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, object])["vocab_size"]
    assert isinstance(vocabulary, int)
    chunk = chunk_of(0, vocabulary)
    whole, chunks = (_step(folder, rows, tokens, kind, chunk) for kind in ("whole", "chunks"))
    held = [(one.peak - one.before) / MEGA for one in (whole, chunks)]
    logits, of_chunk = (4 * count * vocabulary / MEGA for count in (rows * tokens, min(chunk, rows * (tokens - 1))))
    name = f"a step of {rows} x {tokens} tokens, vocabulary {vocabulary:,}"
    return Measured(
        [BenchRow(name, held[1], "MB", peer=held[0], ratio=held[0] / held[1], bound=4 * of_chunk)],
        [
            f"memory  {name}: all logits {held[0]:,.0f} MB ({logits:,.0f} MB in float32, once), chunks of "
            f"{chunk} tokens {held[1]:,.0f} MB; bound of the head: 4 x {of_chunk:,.0f} MB, the logits of a chunk, "
            "their exponentials and two gradients; the rest are the body's activations and gradients of weights"
        ],
    )


def _step(folder: Path, rows: int, tokens: int, kind: str, chunk: int) -> StepMemory:
    command = [sys.executable, "-m", "asyncflow.bench.training_step", str(folder), str(rows), str(tokens), kind]
    done = subprocess.run([*command, str(chunk)], check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=StepMemory)


def _speed(folder: Path, number: int, budget: int, rounds: int) -> Measured:
    model, data = trained_model(Model(path=str(folder)), ONE_DEVICE), _spread(number)
    lengths = data.prompts.lengths + data.responses.lengths
    cuts = {"in order": list(_in_order(lengths, budget)), "sorted": micro_batch_rows(data, budget)}
    padded = {name: sum(len(rows) * int(lengths[rows].max()) for rows in cut) for name, cut in cuts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cuts}
    for _ in range(rounds + 1):
        for name, cut in cuts.items():
            seconds[name].append(_seconds(model, data, cut))
    ratios = [before / after for before, after in zip(seconds["in order"][1:], seconds["sorted"][1:], strict=True)]
    real, (before, after) = int(lengths.sum()), (float(np.median(taken[1:])) for taken in seconds.values())
    ratio, bound = float(np.median(ratios)), padded["in order"] / real
    return Measured(
        [BenchRow("training, sorted rows", real / after, "tokens/s", peer=real / before, ratio=ratio, bound=bound)],
        [
            f"speed   {number} rows, lengths median {np.median(lengths):.0f}, p99 {np.percentile(lengths, 99):.0f}, "
            f"micro-batches of {budget} tokens: in order {real / before:,.0f} tokens/s "
            f"({1 - real / padded['in order']:.0%} padding), sorted {real / after:,.0f} "
            f"({1 - real / padded['sorted']:.0%}): {ratio:.2f} times ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"bound without padding {bound:.2f}"
        ],
    )


def _seconds(model: ParallelModel, data: TokenRows, cut: list[npt.NDArray[np.int64]]) -> float:
    start = time.perf_counter()
    for rows in cut:
        part = data.take(rows)
        model.backward(part, sys.maxsize, lambda outputs, micro: -response_log_probs(outputs, micro).mean())
    return time.perf_counter() - start


def _in_order(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in their order, each micro-batch as many as the budget takes."""
    start = 0
    for row in range(1, len(lengths) + 1):
        if row == len(lengths) or (row + 1 - start) * int(lengths[start : row + 1].max()) > budget:
            yield np.arange(start, row)
            start = row


def _spread(number: int) -> TokenRows:
    """Rows of 8 prompt tokens and responses whose lengths are log-normal, at most 500."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(np.exp(draw.normal(np.log(48), 0.9, number)).astype(np.int64) + 1, 500)
    return TokenRows.of(
        [draw.integers(2, 512, 8) for _ in lengths],
        [draw.integers(2, 512, length) for length in lengths],
    )


def _random(folder: Path, vocabulary: int, hidden: int, layers: int) -> Path:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    return folder
