"""The policy on p-t-d ranks: the stages, the step and the publication of `PolicyWorker`, as one process would do them.

    rows of a replica             --> update     the same loss, norm, measures and next weights on every rank
                                  --> log_probs  on its last stage
    rows of a generation replica  --> generate   on its last stage, between a switch of layouts and the one back;
                                                 by vLLM on its first rank, which the switch brings up to date
    the weights                   --> snapshot   on rank 0, byte for byte what a single process publishes

Every rank of the topology calls each method together. A rank whose answer is not collected returns None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from protocols.control.requests import CodeSource
from protocols.data.columns import Jagged, rows_of
from protocols.data.messages import Experience, LogProbs, Metrics, Prompts, Rollouts
from protocols.layout.topology import Backend, GenerationGrouping, Topology
from protocols.roles import Sampling
from protocols.stage import Partial
from protocols.weights import Probe, Version
from workers.data.hf_folder import end_of_sequence
from workers.data.pretraining import PretrainingText, ReplicaText, is_text
from workers.generation.colocated import ColocatedEngine
from workers.generation.colocated_vllm import ColocatedVllm
from workers.generation.hybrid import ColocatedTorch
from workers.generation.packed import PackedWeights
from workers.losses.aggregation import reduce_loss
from workers.losses.metrics import accumulate, loss_metrics, mean_metrics
from workers.losses.objective import policy_objective
from workers.losses.regularizers import token_entropies
from workers.losses.tokens import Tokens
from workers.losses.validate_loss import reloadable_loss
from workers.parallel.backends import parallel_model
from workers.parallel.model import Loss as LossOf
from workers.parallel.trainable import ParallelTraining
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.roles.policy import PROBE_ROWS, pretraining_of, probe_tokens
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.models import DTYPES, MicroBatch, log_softmax_of
from workers.training.offload import Offloader


class ParallelPolicy:
    """One rank of a policy that is shared by the ranks of a topology.

    `grouping` is the layout to generate in; without one the policy only trains and answers.
    Raises ValueError, with the numbers, where model, topology and torch.distributed's world don't fit.
    """

    def __init__(
        self,
        model: Model,
        topology: Topology,
        loss: Loss,
        optimizer: Optimizer,
        generation: Generation,
        seed: int,
        *,
        grouping: GenerationGrouping | None = None,
        backend: Backend = "3d",
        device: torch.device | str = "cpu",
        recompute: bool = False,
        pretraining: PretrainingText | None = None,
        engine: Literal["torch", "vllm"] = "torch",
        sleeps: bool = False,
    ) -> None:
        """`pretraining`: see PolicyWorker. `engine` draws, where there is a grouping; `sleeps`: see ColocatedVllm."""
        self._policy_loss = reloadable_loss(loss)
        text = pretraining_of(loss, pretraining)
        self.model = parallel_model(
            backend, model.path, topology, dtype=DTYPES[model.dtype], device=device, recompute=recompute
        )
        self.trained = ParallelTraining(self.model, model.path, model.learning_rate, optimizer)
        self.residence = Offloader(self.model.device, self.trained.relocate)
        self.hybrid = HybridEngine(self.model, grouping) if grouping is not None else None
        self._text = ReplicaText(text, self.model.place.dp, topology.dp) if text is not None else None
        self._loss = loss
        self._temperature = generation.temperature
        self._tolerance = generation.probe_tolerance
        self._seed = seed
        self.colocated: ColocatedEngine | None = None
        if self.hybrid is not None and engine == "vllm":
            self.colocated = ColocatedVllm(self.hybrid, model, generation, seed, sleeps=sleeps)
        elif self.hybrid is not None:
            self.colocated = ColocatedTorch(self.hybrid, generation, seed, end_of_sequence(model.path))

    def generate(self, prompts: Prompts, *, sampling: Sampling) -> Partial[Rollouts] | None:
        """Draw this generation replica's rows, perhaps none, with the current weights; those that don't fit fail.

        A row's tokens are those that one process would draw. The ranks switch for it and back, unless they have
        switched already. Raises RuntimeError without a layout to generate in, ValueError for a row that was
        admitted at a version newer than the weights.
        """
        engine = self._engine()
        if len(prompts) and (oldest := int(prompts.min_versions.max())) > self.trained.version:
            raise ValueError(
                f"a prompt of version {oldest} can't be drawn by weights of version {self.trained.version}"
            )
        if engine.generating:
            return engine.generate(prompts, sampling)
        self.to_generation()
        try:
            return engine.generate(prompts, sampling)
        finally:
            self.to_training()

    def to_generation(self) -> Transition | None:
        """See ColocatedEngine.publish. Raises RuntimeError without a layout to generate in."""
        return self._engine().publish(self.trained.version, self.probe)

    def to_training(self) -> None:
        """See ColocatedEngine.release."""
        self._engine().release()

    def log_probs(self, rollouts: Rollouts) -> LogProbs | None:
        """Log-probs of this replica's rows under the current weights, at the sampling temperature."""
        log_probs = self._log_probs(rollouts)
        if log_probs is None or not self.model.is_output_rank:
            return None
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=log_probs)

    def update(self, experience: Experience) -> Metrics | None:
        """epochs x mini_batches optimizer steps on all replicas' rows, of which these are the own ones, perhaps none.

        The metrics are those of all rows on every replica, so that their mean is what one process measures.
        Raises StepRefused, on every rank, and changes nothing, where a loss or a gradient is not finite.
        """
        several = self._loss.epochs * self._loss.mini_batches > 1
        old_log_probs = self._log_probs(experience) if several else None
        measured: dict[str, float] = {}

        def objective(batch: Experience, weights: Jagged) -> LossOf:
            start = _start_of(batch, experience, old_log_probs) if old_log_probs is not None else None
            return self._objective(batch, weights, start, measured)

        beside = self._text.rows if self._text is not None else None
        taken = self.trained.learn("policy.update", experience, self._loss, self._seed, objective, beside)
        whole = self.trained.over_replicas(measured) | taken
        return Metrics(values=mean_metrics(whole)) if self.model.is_output_rank else None

    def snapshot(self, version: Version) -> PackedWeights | None:
        """What `PolicyWorker.snapshot` gives, on rank 0: the canonical tensors and the answer to the probe batch.

        The buffer is a copy: the next optimizer step may start when this returns.
        """
        probe = self.probe()
        whole = self.trained.collect()
        return PackedWeights.publish(version, whole, probe) if self.model.rank == 0 else None

    def save(self, folder: str) -> None:
        """See ParallelTraining.save."""
        self.trained.save(folder)

    def load(self, folder: str) -> None:
        """See ParallelTraining.load."""
        self.trained.load(folder)
        if self.colocated is not None:
            self.colocated.restored()

    def export(self, folder: str) -> None:
        """See ParallelTraining.export."""
        self.trained.export(folder)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make and try the loss anew where it is a user's and its file is among these. Raises BadCode."""
        self._policy_loss.prepare(sources)

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next step on, or drop it."""
        self._policy_loss.switch(take)

    def close(self) -> None:
        """End the engine that is beside the model, where there is one."""
        if self.colocated is not None:
            self.colocated.close()

    def _engine(self) -> ColocatedEngine:
        if self.colocated is None:
            raise RuntimeError("this policy was given no generation layout: it trains and answers, others generate")
        return self.colocated

    def _objective(
        self, batch: Experience, weights: Jagged, old_log_probs: Jagged | None, measured: dict[str, float]
    ) -> LossOf:
        """The loss of a mini-batch's micro-batches; what they measure is added to `measured`."""
        of_text = self._text.weights(batch) if self._text is not None else None

        def loss(outputs: Tensor, micro: MicroBatch) -> Tensor:
            tokens = self._tokens(outputs, micro, batch, old_log_probs)
            objective = policy_objective(self._policy_loss.current, tokens, self._loss)
            accumulate(measured, loss_metrics(tokens, objective, self._loss))
            reinforced = reduce_loss(objective.loss, micro.column(weights).to(outputs.device))
            if of_text is None:
                return reinforced
            # At temperature 1: the text was written, not drawn.
            cross_entropy = reduce_loss(-_log_probs_of(outputs, micro, 1.0), micro.column(of_text).to(outputs.device))
            accumulate(measured, {"ptx_loss": cross_entropy.item()})
            return reinforced + self._loss.ptx_coefficient * cross_entropy

        return loss

    def _tokens(self, outputs: Tensor, micro: MicroBatch, batch: Experience, old_log_probs: Jagged | None) -> Tokens:
        def column(values: Jagged) -> Tensor:
            return micro.column(values).to(outputs.device)

        logits = micro.before_response(outputs)
        log_probs = log_softmax_of(logits, micro.response_tokens().to(outputs.device), self._temperature)
        return Tokens(
            log_probs=log_probs,
            old_log_probs=column(old_log_probs) if old_log_probs is not None else log_probs.detach(),
            rollout_log_probs=column(batch.log_probs),
            advantages=column(batch.advantages),
            mask=column(batch.loss_mask) != 0,
            lengths=torch.from_numpy(micro.response_lengths).to(outputs.device),
            reference=column(batch.reference),
            entropies=token_entropies(logits, self._temperature) if self._loss.entropy_coefficient else None,
        )

    def _log_probs(self, rows: Rollouts | Experience) -> Jagged | None:
        """Log-probs of the response tokens, on every rank of the last stage."""
        budget = self._loss.tokens_per_micro_batch
        return self.trained.per_response(rows, budget, lambda o, m: _log_probs_of(o, m, self._temperature))

    def probe(self) -> Probe:
        """The probe batch and this model's answer to it, on every rank: who installs its weights must answer alike."""
        tokens = probe_tokens(self.model.plan.decoder.vocabulary, self._seed).numpy().astype(np.int32)
        batch = _Probe(Jagged.from_rows([row[:1] for row in tokens]), Jagged.from_rows([row[1:] for row in tokens]))
        kept = self.model.forward(batch, tokens.size, lambda o, m: _log_probs_of(o, m, 1.0))
        replica, model = self.model.groups.replica, self.model
        answers = kept[0] if kept else torch.empty(len(batch.responses.values), device=model.device)
        replica.broadcast_(answers, replica.ranks[(model.plan.pp - 1) * model.plan.tp])
        return Probe(tokens.tolist(), answers.view(PROBE_ROWS, -1).tolist(), self._tolerance)


class _Probe(NamedTuple):
    """The probe batch: its first tokens, and the others, which are answered."""

    prompts: Jagged
    responses: Jagged


def _start_of(batch: Experience, experience: Experience, old_log_probs: Jagged) -> Jagged:
    """`old_log_probs` of the batch's rows, which are some of the experience's; text beside them has none."""
    text = is_text(batch)
    start = old_log_probs.take(rows_of(experience, batch.sample_ids[~text]))
    beside = batch.responses.take(np.flatnonzero(text))
    return Jagged.concat([start, beside.with_values(np.zeros(len(beside.values), np.float32))])


def _log_probs_of(outputs: Tensor, micro: MicroBatch, temperature: float) -> Tensor:
    tokens = micro.response_tokens().to(outputs.device)
    return log_softmax_of(micro.before_response(outputs), tokens, temperature)
