"""The engine seam: submit rows, step until they finish, load weights between steps.

An engine is synchronous and owned by one thread: whoever drives it decides when it steps, so pausing it
is not stepping it, and a load stands between two steps by construction. Rows that are running at a load
go on under the new weights with their KV cache recomputed; their per-token versions tell where it happened.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.columns import Jagged, empty, select, take
from protocols.data.messages import Finish, Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Failure
from protocols.weights import InstallReceipt, Version, WeightManifest


class FinishedRow(msgspec.Struct, frozen=True):
    """One finished response of T tokens."""

    sample_id: int
    tokens: npt.NDArray[np.int32]  # [T], end-of-sequence included where finish is STOP
    log_probs: npt.NDArray[np.float32]  # [T] of the drawn token, at the sampling temperature
    versions: npt.NDArray[np.int32]  # [T] step of the weights that drew it
    finish: Finish


class Engine(ABC):
    """Draws rollouts for one replica."""

    @property
    @abstractmethod
    def version(self) -> Version | None:
        """Version of the installed weights; None before the first load: such an engine serves nothing."""

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """Rows submitted and not yet returned by `step`."""

    @abstractmethod
    def submit(self, prompts: Prompts, sampling: Sampling, retry: int = 0) -> None:
        """Queue rows. Row i draws with `protocols.data.ids.sampling_seed(run_seed, sample_ids[i], retry)`.

        Raises ValueError naming the sample where prompt and max_tokens do not fit the model's context;
        then none of the rows is queued.
        """

    @abstractmethod
    def step(self) -> list[FinishedRow]:
        """Advance the running rows by some tokens; the rows that finished. Empty when nothing is queued."""

    @abstractmethod
    def load(self, manifest: WeightManifest, buffer: npt.NDArray[np.uint8]) -> InstallReceipt:
        """Install canonical tensors: verify digests, load, drop every cache of old weights, answer the probe.

        Raises BadWeights where a digest, the finiteness of a tensor or the probe refuses, or where the version is not
        newer than the installed one. `version` is then as it was, or None where the old weights were gone already.
        """

    @abstractmethod
    def statistics(self) -> dict[str, float]:
        """Gauges of the engine by name: running, waiting, tokens_generated, kv_cache_used_ratio where known."""

    @abstractmethod
    def close(self) -> None:
        """Free threads, memory and processes. Idempotent."""


def to_rollouts(prompts: Prompts, rows: list[FinishedRow]) -> Rollouts:
    """Finished rows as a message, in the order of `rows`, with their prompts taken from `prompts`."""
    if not rows:
        return empty(Rollouts)
    asked = select(prompts, [r.sample_id for r in rows])
    responses = Jagged.from_rows([r.tokens for r in rows], np.int32)
    return Rollouts(
        sample_ids=asked.sample_ids,
        prompts=asked.prompts,
        references=asked.references,
        responses=responses,
        log_probs=Jagged.from_rows([r.log_probs for r in rows], np.float32),
        versions=Jagged.from_rows([r.versions for r in rows], np.int32),
        loss_mask=responses.with_values(np.ones(len(responses.values), np.uint8)),
        finishes=np.array([r.finish for r in rows], np.uint8),
    )


def submit_rows(engine: Engine, rows: Prompts, sampling: Sampling) -> list[Failure]:
    """Submit rows to an engine; a row that it can't take fails alone."""
    try:
        engine.submit(rows, sampling)
    except ValueError:
        return [f for i in range(len(rows)) if (f := _submit_one(engine, take(rows, [i]), sampling))]
    return []


def _submit_one(engine: Engine, row: Prompts, sampling: Sampling) -> Failure | None:
    try:
        engine.submit(row, sampling)
    except ValueError as error:
        return Failure(int(row.sample_ids[0]), str(error))
    return None


def refuse_unfit(prompts: Prompts, sampling: Sampling, taken: Container[int], context: int, vocabulary: int) -> None:
    """Raise ValueError naming the first sample that an engine of this context and vocabulary (tokens) can't run."""
    if sampling.max_tokens < 1 or not 0.0 <= sampling.temperature < math.inf:
        raise ValueError(
            f"sampling needs max_tokens of 1 or more and a finite temperature of 0 or more, got {sampling}"
        )
    seen: set[int] = set()
    for sample_id, prompt in zip(prompts.sample_ids.tolist(), prompts.prompts, strict=True):
        if len(prompt) == 0:
            raise ValueError(f"sample {sample_id}: the prompt is empty")
        if len(prompt) + sampling.max_tokens > context:
            raise ValueError(
                f"sample {sample_id}: prompt of {len(prompt)} tokens and max_tokens {sampling.max_tokens} exceed "
                f"the model's context of {context}; shorten the prompt or lower max_tokens"
            )
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
            raise ValueError(f"sample {sample_id}: token {int(prompt.max())} is outside the vocabulary of {vocabulary}")
        if sample_id in taken or sample_id in seen:
            raise ValueError(f"sample {sample_id} is already being generated")
        seen.add(sample_id)
