"""One forward and backward pass in a process of its own, whose peak of memory is the answer.

python -m asyncflow.bench.training_step MODEL ROWS TOKENS whole|chunks CHUNK      prints a StepMemory as JSON
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import msgspec
import numpy as np
from torch import Tensor

from workers.data.token_rows import TokenRows
from workers.parallel.backends import trained_model
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Model
from workers.training.micro_batches import MicroBatch
from workers.training.models import log_softmax_of, response_log_probs
from workers.training.outputs import Outputs


class StepMemory(msgspec.Struct, frozen=True):
    """Bytes of a process."""

    before: int  # resident when the model is there and has taken a step of one token
    peak: int  # highest in the step


def measure(folder: str, rows: int, tokens: int, *, whole: bool, chunk: int) -> StepMemory:
    """The step of `rows` rows of one prompt token and `tokens` in all, in one micro-batch."""
    model = trained_model(Model(path=folder, head_chunk=chunk, learning_rate=1e-4), ONE_DEVICE)
    ids = np.random.default_rng(0).integers(2, model.config.get_text_config().vocab_size, (rows, tokens))
    loss = _of_all_logits if whole else _of_responses
    model.backward(TokenRows.of(ids[:1, :1], ids[:1, 1:2]), rows * tokens, loss)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model.backward(TokenRows.of(ids[:, :1], ids[:, 1:]), rows * tokens, loss)
    return StepMemory(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _of_responses(outputs: Outputs, micro: MicroBatch) -> Tensor:
    return -response_log_probs(outputs, micro).mean()


def _of_all_logits(outputs: Outputs, micro: MicroBatch) -> Tensor:
    """The same loss, from the logits of all positions."""
    return -log_softmax_of(outputs.before_response(micro), micro.response_tokens()).mean()


if __name__ == "__main__":
    path, number, length, kind, size = sys.argv[1:]
    found = measure(path, int(number), int(length), whole=kind == "whole", chunk=int(size))
    print(msgspec.json.encode(found).decode())  # noqa: T201 - its answer
