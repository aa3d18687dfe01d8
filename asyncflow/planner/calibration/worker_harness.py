"""Build a recipe's workers in this process, as its services do, with rows to call them on."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from functools import cached_property, partial

import msgspec
import numpy as np

from asyncflow.control.admission.prompts import PromptSource
from asyncflow.dataflow.graph import Dataflow
from asyncflow.planner.calibration.calibration import Timed
from asyncflow.planner.calibration.machine import CalibrationSizes, median_s
from asyncflow.planner.simulation.scenarios import shapes_of
from asyncflow.recipe.config import Recipe
from asyncflow.recipe.evaluations import is_evaluator
from asyncflow.recipe.service_specs import GENERATOR, compose
from asyncflow.services.ranks.spec import ServiceSpec
from asyncflow.services.ranks.worker_factory import build
from protocols.data.columns import Batch
from protocols.data.jagged import Jagged
from protocols.data.messages import Costs, Experience, LogProbs, Prompts, Rollouts, Scores, Values
from protocols.weights import Version
from workers.generation.engine import Engine
from workers.generation.packed import received


class WorkerHarness:
    """The workers of a recipe; `close` frees them."""

    def __init__(
        self,
        recipe: Recipe,
        dataflow: Dataflow,
        source: PromptSource,
        sizes: CalibrationSizes,
        only: Collection[str] = (),
    ) -> None:
        """`only` limits the services; these do not generate. By default all are built."""
        self.recipe, self.dataflow, self.source, self.sizes = recipe, dataflow, source, sizes
        self.specs = {spec.name: spec for spec in compose(recipe, dataflow, "calibration", 0, tempfile.gettempdir())}
        names = only or [name for name in self.specs if not is_evaluator(name)]
        self.loaded = {name: build(_alone(self.specs[name], generates=not only)) for name in names}
        self._vocabulary = int(shapes_of(recipe)["policy"].vocabulary)
        self._rng = np.random.default_rng(recipe.seed)

    @cached_property
    def engine(self) -> Engine:
        """The generation engine, with the policy's weights loaded."""
        policy = self.loaded["policy"]
        engine = self.loaded[GENERATOR].engine if GENERATOR in self.loaded else policy.engine
        assert engine is not None
        if engine.version is None:
            manifest, buffer = policy.worker.snapshot(Version(0, 0))
            engine.load(received(manifest, buffer, self.recipe.models["policy"]))
        return engine

    def close(self) -> None:
        """Free the workers."""
        for loaded in self.loaded.values():
            loaded.close()

    def prompts(self, rows: int) -> Prompts:
        """The recipe's own prompts, one row each."""
        ids = [self.source.at(position) for position in range(rows)]
        return self.source.requests(ids, 1, 0)

    def rollouts(self, rows: int, tokens: int) -> Rollouts:
        """The recipe's own prompts with responses of `tokens` random tokens."""
        prompts = self.prompts(rows)
        responses = Jagged.from_rows(list(self._rng.integers(2, self._vocabulary, (rows, tokens)).astype(np.int32)))
        return Rollouts(
            sample_ids=prompts.sample_ids,
            prompts=prompts.prompts,
            references=prompts.references,
            columns=prompts.columns,
            responses=responses,
            log_probs=responses.with_values(np.full(rows * tokens, -3.0, np.float32)),
            versions=responses.with_values(np.zeros(rows * tokens, np.int32)),
            loss_mask=responses.with_values(np.ones(rows * tokens, np.uint8)),
            finishes=np.zeros(rows, np.uint8),
        )

    def experience(self, rows: int, tokens: int) -> Experience:
        """Rows of `rollouts` with small random advantages."""
        rollouts = self.rollouts(rows, tokens)
        noise = rollouts.log_probs.with_values(self._rng.normal(0, 0.1, rows * tokens).astype(np.float32))
        columns = dict.fromkeys(("advantages", "returns", "values", "reference", "cost_returns", "cost_values"), noise)
        return Experience(
            sample_ids=rollouts.sample_ids, prompts=rollouts.prompts, responses=rollouts.responses,
            loss_mask=rollouts.loss_mask, log_probs=rollouts.log_probs, **columns,
        )  # fmt: skip


def _alone(spec: ServiceSpec, generates: bool) -> ServiceSpec:
    """The spec of a service without other ranks."""
    stages = [stage for stage in spec.stages if generates or stage.fires != "generate"]
    return msgspec.structs.replace(spec, collective=False, stages=stages)


def message_of(kind: type[Batch], rollouts: Rollouts) -> Batch:
    """A message of a type for the rows of some rollouts."""
    ids, rows = rollouts.sample_ids, len(rollouts)
    match kind.__name__:
        case "LogProbs":
            return LogProbs(sample_ids=ids, log_probs=rollouts.log_probs)
        case "Values":
            return Values(sample_ids=ids, values=rollouts.log_probs, versions=np.zeros(rows, np.int64))
        case "Scores":
            return Scores(sample_ids=ids, scores=np.arange(rows, dtype=np.float32))
        case "Costs":
            return Costs(sample_ids=ids, costs=np.arange(rows, dtype=np.float32))
        case _:
            return rollouts


def forward_calls(harness: WorkerHarness, tokens: int) -> list[Timed]:
    """Time forward passes of the policy's shape, on rows that fit one micro-batch."""
    loaded = harness.loaded.get("reference") or harness.loaded["policy"]
    timed = []
    for rows in harness.sizes.rows:
        rollouts = harness.rollouts(rows, tokens)
        if rollouts.token_counts.max() * rows <= harness.recipe.loss.tokens_per_micro_batch:
            seconds = median_s(partial(loaded.worker.log_probs, rollouts), harness.sizes.rounds)
            timed.append(Timed(int(rollouts.token_counts.sum()), seconds))
    return timed


def update_calls(harness: WorkerHarness, tokens: int) -> list[Timed]:
    """Time updates of the policy: all of its optimizer steps together."""
    timed = []
    for rows in harness.sizes.trained_rows:
        experience = harness.experience(rows * harness.recipe.loss.mini_batches, tokens)
        if rows * experience.token_counts.max() <= harness.recipe.loss.tokens_per_micro_batch:
            work = partial(harness.loaded["policy"].worker.update, experience)
            seconds = median_s(work, harness.sizes.rounds)
            timed.append(Timed(int(experience.token_counts.sum()), seconds))
    return timed
