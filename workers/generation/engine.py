"""The engine interface: submit rows, step until they finish, load weights between two steps.

An engine is synchronous and owned by one thread. Its owner decides when it steps: to pause it is not to step it, and a
load is always between two steps. Rows that run during a load go on under the new weights, with their KV cache
recomputed; the versions of their tokens show where.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Container

import msgspec
import numpy as np
import numpy.typing as npt

from protocols.data.columns import empty, select, take
from protocols.data.jagged import Jagged
from protocols.data.messages import Finish, Prompts, Rollouts
from protocols.roles import Sampling
from protocols.stage import Failure, Partial
from protocols.version import InstallReceipt, Version
from protocols.weights import BadWeights
from workers.generation.publication import Part, Publication, Shapes, verify_installed, verify_newer, verify_shapes


class FinishedRow(msgspec.Struct, frozen=True):
    """One finished response of T tokens."""

    sample_id: int
    tokens: npt.NDArray[np.int32]  # [T], end-of-sequence included where finish is STOP
    log_probs: npt.NDArray[np.float32]  # [T] of the sampled token, as workers.training.token_distribution defines them
    versions: npt.NDArray[np.int32]  # [T] step of the weights that sampled it
    finish: Finish


class Engine(ABC):
    """Generates rollouts for one replica. Subclasses generate, and implement the steps of `load` for their tensors."""

    def __init__(self, version: Version | None = None, shapes: Shapes | None = None) -> None:
        """`version` is installed already; `shapes` are those of the tensors, None if the first load defines them."""
        self._version = version
        self._newest = version  # the last version verified, also while a refused one leaves the engine without weights
        self._shapes = shapes
        self._loading: Version | None = None
        self.tokens = 0  # generated so far, those of unfinished rows included; read from other threads

    @property
    def version(self) -> Version | None:
        """Version of the installed weights. None before the first load: such an engine generates nothing."""
        return self._version

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """Rows submitted and not yet returned by `step`."""

    @abstractmethod
    def submit(self, prompts: Prompts, sampling: Sampling, retry: int = 0) -> None:
        """Queue rows. Row i samples with `protocols.data.ids.sampling_seed(run_seed, sample_ids[i], retry)`.

        Raises ValueError naming the sample where prompt and max_tokens do not fit the model's context;
        then none of the rows is queued.
        """

    @abstractmethod
    def step(self) -> list[FinishedRow]:
        """Advance the running rows by some tokens; the rows that finished. Empty when nothing is queued."""

    @abstractmethod
    def abort(self) -> None:
        """Drop all rows that `step` has not returned."""

    def load(self, weights: Publication) -> InstallReceipt:
        """Install a version between two steps, and verify it; see `workers.generation.publication`.

        Raises BadWeights if the version is not newer than the last one verified, if bytes or tensors are wrong, and if
        the answer to the probe is. `version` is then what it was, or None if the old weights were overwritten already.
        Such an engine keeps its rows and goes on with the next version that is verified.
        """
        started, version = time.perf_counter(), weights.version
        if self._loading is not None:
            raise BadWeights(f"version {self._loading} was begun and never finished: start a new engine")
        verify_newer(version, self._newest)
        weights.verify()
        if weights.shapes is not None and self._shapes is not None:
            verify_shapes(version, weights.shapes, self._shapes)
        self._start_load(weights)
        self._loading = version
        tensors = sum(self._install(part) for part in weights.parts())
        self._finish_load()
        self._loading = None
        self._empty_caches()
        try:
            difference = verify_installed(weights.probe, self._answer)
        except BadWeights:
            self._end_load(verified=False)
            raise
        self._end_load(verified=True)
        self._version = self._newest = version
        self._shapes = weights.shapes or self._shapes
        return InstallReceipt(version, tensors, difference, time.perf_counter() - started)

    @abstractmethod
    def _start_load(self, weights: Publication) -> None:
        """Prepare for the parts; from here on the old weights may go."""

    @abstractmethod
    def _install(self, part: Part) -> int:
        """Install the tensors of one part; returns how many. They have been read when this returns."""

    def _finish_load(self) -> None:  # noqa: B027 - most engines have nothing left to do
        """Do the work that needs all tensors."""

    @abstractmethod
    def _empty_caches(self) -> None:
        """Drop what was computed with the old weights and would be reused, such as a prefix cache."""

    @abstractmethod
    def _answer(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of each sequence's tokens but the first, under the installed weights."""

    @abstractmethod
    def _end_load(self, *, verified: bool) -> None:
        """Free what the load needed. If it is not verified, undo it or clean up after it."""

    @abstractmethod
    def close(self) -> None:
        """Free threads, memory and processes. Idempotent."""


def generate_all(engine: Engine, prompts: Prompts, sampling: Sampling) -> Partial[Rollouts]:
    """Submit rows and step until all have finished: rollouts in the order of the prompts, and the rows that failed."""
    failures = submit_rows(engine, prompts, sampling)
    finished: dict[int, FinishedRow] = {}
    while engine.unfinished:
        finished |= {row.sample_id: row for row in engine.step()}
    generated = [finished[sample] for sample in prompts.sample_ids.tolist() if sample in finished]
    return Partial(to_rollouts(prompts, generated), failures)


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
        columns=asked.columns,
        responses=responses,
        log_probs=Jagged.from_rows([r.log_probs for r in rows], np.float32),
        versions=Jagged.from_rows([r.versions for r in rows], np.int32),
        loss_mask=responses.with_values(np.ones(len(responses.values), np.uint8)),
        finishes=np.array([r.finish for r in rows], np.uint8),
    )


def submit_rows(engine: Engine, rows: Prompts, sampling: Sampling) -> list[Failure]:
    """Submit rows to an engine; a row that the engine refuses fails alone."""
    try:
        engine.submit(rows, sampling)
    except ValueError as error:
        if len(rows) == 1:
            return [Failure(int(rows.sample_ids[0]), str(error))]
        return [failure for i in range(len(rows)) for failure in submit_rows(engine, take(rows, [i]), sampling)]
    return []


def refuse_sampling(sampling: Sampling) -> None:
    """Raise ValueError for values that can't be sampled with."""
    wanted = {
        "max_tokens of 1 or more": sampling.max_tokens >= 1,
        "a finite temperature of 0 or more": 0.0 <= sampling.temperature < math.inf,
        "top_p above 0 and at most 1": 0.0 < sampling.top_p <= 1.0,
        "top_k of 0 or more": sampling.top_k >= 0,
        "min_p of 0 to 1": 0.0 <= sampling.min_p <= 1.0,
        "min_tokens of 0 or more, less than max_tokens": 0 <= sampling.min_tokens < max(sampling.max_tokens, 1),
        "stop texts that are not empty": "" not in sampling.stop,
    }
    for condition, holds in wanted.items():
        if not holds:
            raise ValueError(f"sampling needs {condition}, got {sampling}")


def refuse_unfit(prompts: Prompts, sampling: Sampling, taken: Container[int], context: int, vocabulary: int) -> None:
    """Raise ValueError naming the first sample that an engine of this context and vocabulary (tokens) can't run."""
    refuse_sampling(sampling)
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
