"""The policy: the model that is trained, and whose weights are published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from protocols.control.requests import CodeSource
from protocols.data.columns import Jagged, rows_of
from protocols.data.messages import Experience, LogProbs, Metrics, Prompts, Rollouts
from protocols.roles import Policy, Sampling
from protocols.stage import stage
from protocols.weights import Probe, Version
from workers.data.hf_folder import end_of_sequence
from workers.data.pretraining import PretrainingText, TextBatch
from workers.finetune.sft import response_loss
from workers.generation.engine import to_rollouts
from workers.generation.packed import PackedWeights
from workers.generation.torch import TorchEngine
from workers.losses.aggregation import counts_of, reduce_loss, token_weights
from workers.losses.metrics import STEPS, accumulate, loss_metrics, mean_metrics
from workers.losses.objective import policy_objective
from workers.losses.regularizers import token_entropies
from workers.losses.tokens import Tokens
from workers.losses.validate_loss import reloadable_loss
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.lora import Adapters
from workers.training.models import (
    MicroBatch,
    load_causal,
    log_softmax_of,
    micro_batches,
    per_response,
    token_log_probs,
)
from workers.training.optimizer_step import StepRefused
from workers.training.trainable import TrainedModel, mini_batches, named_rows

PROBE_ROWS, PROBE_TOKENS = 4, 64  # longer than three KV blocks of 16, where a stale prefix cache would show


class PolicyWorker(Policy):
    """One rank of the policy. Version k means: weights after k committed steps."""

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: Optimizer,
        generation: Generation,
        seed: int,
        pretraining: PretrainingText | None = None,
    ) -> None:
        """`pretraining`: the text of `loss.ptx_coefficient`; None where that is 0."""
        self._policy_loss = reloadable_loss(loss)
        self._pretraining = pretraining_of(loss, pretraining)
        causal = load_causal(model.path, model.dtype)
        adapters = Adapters(causal, model.path, model.lora, seed) if model.lora.rank else None
        self.trained = TrainedModel(causal, model.path, model.learning_rate, optimizer, adapters)
        self._sends_adapters = model.lora.publish == "adapters"
        self._loss = loss
        self._generation = generation
        self._temperature = generation.temperature
        self._end_of_sequence = end_of_sequence(model.path)
        self._tolerance = generation.probe_tolerance
        self._seed = seed
        self._probe = probe_tokens(self.trained.model.config.vocab_size, seed)

    def generate(self, prompts: Prompts, *, sampling: Sampling) -> Rollouts:
        """Draw all rows at once with the current weights. A service drives the engine itself, row by row."""
        engine = self.engine(term=0)
        engine.submit(prompts, sampling)
        finished = []
        while engine.unfinished:
            finished += engine.step()
        order = {sample: place for place, sample in enumerate(prompts.sample_ids.tolist())}
        return to_rollouts(prompts, sorted(finished, key=lambda row: order[row.sample_id]))

    def engine(self, term: int) -> TorchEngine:
        """An engine that runs this very model, at its current version; `load_in_place` after an update."""
        model, version = self.trained.model, Version(term, self.trained.version)
        return TorchEngine(
            model, self._generation, self._seed, self._end_of_sequence, owns_model=False, version=version
        )

    @stage(protocol="3D_PROTO")
    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """Log-probs under the current weights, at the sampling temperature."""
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=self._log_probs(rollouts))

    @stage(protocol="METRIC")
    def update(self, experience: Experience) -> Metrics:
        """epochs x mini_batches optimizer steps.

        Raises StepRefused, and changes nothing, where a loss or a gradient is not finite.
        """
        steps = self._loss.epochs * self._loss.mini_batches
        # With several optimizer steps the trust region stands around the weights at the start of the step.
        old_log_probs = self._log_probs(experience) if steps > 1 else None
        measured: dict[str, float] = {}
        with self.trained.update(steps):
            drawn = mini_batches(experience, self._loss, seed=self._seed + self.trained.version)
            for number, batch in enumerate(drawn, self.trained.version * steps):
                start = old_log_probs.take(rows_of(experience, batch.sample_ids)) if old_log_probs is not None else None
                accumulate(measured, self._optimizer_step(batch, start, number))
        return Metrics(values=mean_metrics(measured))

    def _optimizer_step(self, batch: Experience, old_log_probs: Jagged | None, number: int) -> dict[str, float]:
        """Optimizer step `number` of the run, counted from 0."""
        weights = token_weights(batch.loss_mask, counts_of(batch.loss_mask), self._loss)
        measured: dict[str, float] = {}
        total = 0.0
        for micro in micro_batches(batch, self._loss.tokens_per_micro_batch):
            tokens = self._tokens(micro, batch, old_log_probs)
            objective = policy_objective(self._policy_loss.current, tokens, self._loss)
            loss = reduce_loss(objective.loss, micro.column(weights))
            loss.backward()
            total += loss.item()
            accumulate(measured, loss_metrics(tokens, objective, self._loss))
        if self._pretraining is not None:
            measured["ptx_loss"] = self._pretrain(self._pretraining.batch(number))
            total += self._loss.ptx_coefficient * measured["ptx_loss"]
        if not np.isfinite(total):
            raise StepRefused(f"policy.update of {named_rows(batch)}: loss is {total}")
        norm = self.trained.apply_gradients(f"policy.update of {named_rows(batch)}")
        return measured | {"loss": total, "gradient_norm": norm, STEPS: 1.0}

    def _pretrain(self, text: TextBatch) -> float:
        """Add the gradient of ptx_coefficient times the text's cross-entropy, and return that, nats a token.

        L = L_RL + ptx_coefficient * mean of -log p(token) over the text's tokens (Ouyang et al. 2022, ptx). At
        temperature 1: the text was written, not drawn.
        """
        cross_entropy = 0.0
        for part in response_loss(self.trained.model, text, self._loss.tokens_per_micro_batch):
            (self._loss.ptx_coefficient * part).backward()
            cross_entropy += part.item()
        return cross_entropy

    def _tokens(self, micro: MicroBatch, batch: Experience, old_log_probs: Jagged | None) -> Tokens:
        log_probs, entropies = self._forward(micro)
        return Tokens(
            log_probs=log_probs,
            old_log_probs=micro.column(old_log_probs) if old_log_probs is not None else log_probs.detach(),
            rollout_log_probs=micro.column(batch.log_probs),
            advantages=micro.column(batch.advantages),
            mask=micro.column(batch.loss_mask) != 0,
            lengths=torch.from_numpy(micro.response_lengths),
            reference=micro.column(batch.reference),
            entropies=entropies,
        )

    def _forward(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the response tokens, and the entropies where the loss has a bonus for them."""
        if not self._loss.entropy_coefficient:
            return token_log_probs(self.trained.model, micro, self._temperature), None
        output = self.trained.model(input_ids=micro.tokens, attention_mask=micro.mask, use_cache=False)
        logits = micro.before_response(output.logits)
        log_probs = log_softmax_of(logits, micro.response_tokens(), self._temperature)
        return log_probs, token_entropies(logits, self._temperature)

    def _log_probs(self, rows: Rollouts | Experience) -> Jagged:
        budget = self._loss.tokens_per_micro_batch
        return per_response(rows, budget, lambda b: token_log_probs(self.trained.model, b, self._temperature))

    @torch.no_grad()
    def snapshot(self, version: Version) -> PackedWeights:
        """The canonical tensors as one buffer, with their digests and the answer to the probe batch.

        Of adapters they are the merged ones, or the adapters alone where the recipe wants that; the answer is that of
        the merged ones, which an engine has in either case. The buffer is a copy: the next optimizer step may start
        when this returns.
        """
        adapters, tensors, scaling = self.trained.adapters, self.trained.tensors(), None
        forward = self.trained.model if adapters is None else partial(adapters.forward_merged, tensors)
        probe = Probe(self._probe.tolist(), _probe_log_probs(forward, self._probe), self._tolerance)
        if adapters is not None and self._sends_adapters:
            tensors, scaling = adapters.tensors(), adapters.scaling
        return PackedWeights.publish(version, tensors, probe, scaling)

    def save(self, folder: str) -> None:
        """See TrainedModel.save."""
        self.trained.save(folder)

    def load(self, folder: str) -> None:
        """See TrainedModel.load."""
        with torch.no_grad():
            self.trained.load(folder)

    def export(self, folder: str) -> None:
        """See TrainedModel.export."""
        self.trained.export(folder)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Make and try the loss anew where it is a user's and its file is among these. Raises BadCode."""
        self._policy_loss.prepare(sources)

    def switch_code(self, take: bool) -> None:
        """Take what was prepared from the next step on, or drop it."""
        self._policy_loss.switch(take)


def pretraining_of(loss: Loss, text: PretrainingText | None) -> PretrainingText | None:
    """The text whose loss is added, None for none. Raises ValueError where there is a coefficient and no text."""
    if loss.ptx_coefficient and text is None:
        raise ValueError(f"ptx_coefficient = {loss.ptx_coefficient} needs pretraining text: there is none")
    return text if loss.ptx_coefficient else None


def probe_tokens(vocabulary: int, seed: int) -> torch.Tensor:
    """The probe batch of a run, int64 [PROBE_ROWS, PROBE_TOKENS]: the same wherever the policy is trained."""
    drawn = np.random.default_rng([seed, vocabulary]).integers(0, vocabulary, (PROBE_ROWS, PROBE_TOKENS))
    return torch.from_numpy(drawn.astype(np.int64))


def _probe_log_probs(forward: Callable[..., Any], tokens: torch.Tensor) -> list[list[float]]:
    logits = forward(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1).tolist()
