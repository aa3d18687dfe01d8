"""The policy: the model that is trained, and whose weights are published."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from protocols.columns import Jagged, rows_of
from protocols.messages import Experience, LogProbs, Metrics, Prompts, Rollouts
from protocols.roles import Policy, Sampling
from protocols.stage import stage
from protocols.weights import Probe, Version, WeightManifest, pack
from workers.folders import end_of_sequence
from workers.generation.engine import to_rollouts
from workers.generation.torch import TorchEngine
from workers.losses import POLICY_LOSSES, clipped_tokens, reduce_loss, token_weights
from workers.models import MicroBatch, canonical_tensors, load_causal, micro_batches, per_response, token_log_probs
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training import StepRefused, TrainedModel, mini_batches, named_rows

PROBE_ROWS, PROBE_TOKENS = 4, 64  # longer than three KV blocks of 16, where a stale prefix cache would show


class PolicyWorker(Policy):
    """One rank of the policy. Version k means: weights after k committed steps."""

    def __init__(self, model: Model, loss: Loss, optimizer: Optimizer, generation: Generation, seed: int) -> None:
        if loss.name not in POLICY_LOSSES:
            raise ValueError(f"loss.name {loss.name!r}: one of {', '.join(POLICY_LOSSES)}")
        self.trained = TrainedModel(load_causal(model.path, model.dtype), model.path, model.learning_rate, optimizer)
        self._loss = loss
        self._generation = generation
        self._temperature = generation.temperature
        self._end_of_sequence = end_of_sequence(model.path)
        self._tolerance = generation.probe_tolerance
        self._seed = seed
        self._probe = _probe_tokens(self.trained.model.config.vocab_size, seed)

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
        """An engine that draws with this very model, at its current version; `advance` it after an update."""
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
        proximal = self._log_probs(experience) if steps > 1 else None
        measured: dict[str, float] = defaultdict(float)
        with self.trained.update(steps):
            for batch in mini_batches(experience, self._loss, seed=self._seed + self.trained.version):
                start = proximal.take(rows_of(experience, batch.sample_ids)) if proximal is not None else None
                self._optimizer_step(batch, start, measured)
        return Metrics(values=_means(measured))

    def _optimizer_step(self, batch: Experience, proximal: Jagged | None, measured: dict[str, float]) -> None:
        loss_of = POLICY_LOSSES[self._loss.name]
        weights = token_weights(batch.loss_mask, self._loss.aggregation)
        total = 0.0
        for micro in micro_batches(batch, self._loss.tokens_per_micro_batch):
            log_probs = token_log_probs(self.trained.model, micro, self._temperature)
            before = micro.column(proximal) if proximal is not None else log_probs.detach()
            advantages, weight = micro.column(batch.advantages), micro.column(weights)
            loss = reduce_loss(loss_of(log_probs, before, advantages, self._loss), weight)
            loss.backward()
            total += loss.item()
            self._measure(micro, batch, log_probs.detach(), before, advantages, measured)
        if not np.isfinite(total):
            raise StepRefused(f"policy.update of {named_rows(batch)}: loss is {total}")
        measured["gradient_norm"] += self.trained.apply_gradients(f"policy.update of {named_rows(batch)}")
        measured["loss"] += total
        measured["optimizer_steps"] += 1

    def _measure(
        self,
        micro: MicroBatch,
        batch: Experience,
        log_probs: torch.Tensor,
        before: torch.Tensor,
        advantages: torch.Tensor,
        measured: dict[str, float],
    ) -> None:
        mask = micro.column(batch.loss_mask)
        inside = mask != 0
        behaviour = micro.column(batch.log_probs)
        measured["tokens"] += int(inside.sum())
        measured["clipped"] += int(clipped_tokens(log_probs, before, advantages, mask, self._loss))
        measured["mismatch"] += float((behaviour - before)[inside].sum())
        measured["surprise"] -= float(log_probs[inside].sum())
        if bool(inside.any()):
            largest = float((log_probs - behaviour)[inside].abs().max())
            measured["log_ratio_max"] = max(measured["log_ratio_max"], largest)

    def _log_probs(self, rows: Rollouts | Experience) -> Jagged:
        budget = self._loss.tokens_per_micro_batch
        return per_response(rows, budget, lambda b: token_log_probs(self.trained.model, b, self._temperature))

    @torch.no_grad()
    def snapshot(self, version: Version) -> tuple[WeightManifest, np.ndarray]:
        """The canonical tensors as one buffer, with their digests and the answer to the probe batch.

        The buffer is a copy: the next optimizer step may start when this returns.
        """
        tensors = {
            name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), _bytes_of(t))
            for name, t in canonical_tensors(self.trained.model).items()
        }
        entries, buffer = pack(tensors)
        probe = Probe(self._probe.tolist(), _probe_log_probs(self.trained.model, self._probe), self._tolerance)
        return WeightManifest(version, entries, len(buffer), probe), buffer

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


def _means(measured: dict[str, float]) -> dict[str, float]:
    steps, tokens = measured["optimizer_steps"] or 1.0, measured["tokens"] or 1.0
    return {
        "loss": measured["loss"] / steps,
        "gradient_norm": measured["gradient_norm"] / steps,
        "clip_fraction": measured["clipped"] / tokens,
        "mismatch_kl": measured["mismatch"] / tokens,  # k1 of mu against the weights at the start of the step
        "negative_log_likelihood": measured["surprise"] / tokens,  # of the drawn tokens: a sample's entropy
        "log_ratio_max": measured["log_ratio_max"],
        "tokens": tokens,
    }


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _probe_tokens(vocabulary: int, seed: int) -> torch.Tensor:
    drawn = np.random.default_rng([seed, vocabulary]).integers(0, vocabulary, (PROBE_ROWS, PROBE_TOKENS))
    return torch.from_numpy(drawn.astype(np.int64))


def _probe_log_probs(model: torch.nn.Module, tokens: torch.Tensor) -> list[list[float]]:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1).tolist()
