"""The policy: the model that is trained, that generates, and whose weights are published.

    rows of a replica             --> update     the same loss, norm, metrics and next weights on every rank
                                  --> log_probs  on its last stage
    rows of a generation replica  --> generate   on its last stage, or by vLLM on its first; between two switches
    the weights                   --> snapshot   on rank 0, the same bytes whatever the topology and backend

One device is a topology of one rank. All ranks call each method together; those that are not collected return None.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protocols.control.code import CodeSource
from protocols.data.columns import rows_of
from protocols.data.jagged import Jagged
from protocols.data.messages import Experience, LogProbs, Metrics, Prompts, Rollouts
from protocols.layout.topology import GenerationGrouping
from protocols.roles import Policy, Sampling
from protocols.stage import Partial
from protocols.weights import Probe, Version
from workers.data.hf_folder import engine_context
from workers.data.model_config import probe_tokens
from workers.data.pretraining import PretrainingText, ReplicaText, is_text
from workers.data.token_rows import response_column
from workers.data.vocabulary import Vocabulary
from workers.generation.colocated import ColocatedEngine
from workers.generation.colocated_vllm import ColocatedVllm
from workers.generation.engine import generate_all
from workers.generation.hybrid import ColocatedTorch
from workers.generation.own_engine import OwnEngine
from workers.generation.packed import PackedWeights
from workers.generation.torch import TorchEngine
from workers.losses.aggregation import reduce_loss
from workers.losses.metrics import accumulate, loss_metrics, mean_metrics
from workers.losses.objective import policy_objective
from workers.losses.regularizers import measured_entropies, token_entropies
from workers.losses.tokens import Tokens
from workers.losses.validate_loss import reloadable_loss
from workers.parallel.backends import trained_model
from workers.parallel.merged import merged
from workers.parallel.model import MicroLoss
from workers.parallel.sharding import NOT_COLLECTED, ONE_DEVICE, Sharding
from workers.resharding.hybrid_engine import HybridEngine, Transition
from workers.roles.probe import answered_probe
from workers.settings import Generation, Loss, Model, Optimizer
from workers.training.micro_batches import MicroBatch
from workers.training.models import log_softmax_of
from workers.training.offload import Offloader
from workers.training.outputs import Outputs
from workers.training.token_distribution import TokenDistribution
from workers.training.trainable import TrainableModel


class PolicyWorker(Policy):
    """One rank of the policy. Version k means: weights after k committed steps.

    With a `grouping` a hybrid engine generates in that layout; without one, one device generates by itself, and
    several ranks only train and answer. Raises ValueError, with the numbers, where model, topology and
    torch.distributed's world don't fit.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: Optimizer,
        generation: Generation,
        seed: int,
        pretraining: PretrainingText | None = None,
        *,
        sharding: Sharding = ONE_DEVICE,
        grouping: GenerationGrouping | None = None,
        sleeps: bool = False,
    ) -> None:
        """`pretraining`: the text of `loss.ptx_coefficient`; None where that is 0. `sleeps`: see ColocatedVllm."""
        self._policy_loss = reloadable_loss(loss)
        if loss.ptx_coefficient and pretraining is None:
            raise ValueError(f"ptx_coefficient = {loss.ptx_coefficient} needs pretraining text: there is none")
        self.model = trained_model(model, sharding, seed=seed, regrouped=grouping is not None)
        self.trained = TrainableModel(self.model, model.path, model.learning_rate, optimizer)
        self.offloader = Offloader(self.model.device, self.trained.relocate)
        place, replicas = self.model.place, self.model.topology.dp
        self._text = ReplicaText(pretraining, place.dp, replicas) if pretraining is not None else None
        self._publishes_adapters = model.lora.publish == "adapters"
        self._loss = loss
        self._generation = generation
        self._probe_tokens = probe_tokens(engine_context(model.path, generation))
        self._vocabulary = Vocabulary.of(model.path)
        self._distribution = TokenDistribution(generation.sampling, self._vocabulary)
        self._seed = seed
        self.hybrid = HybridEngine(self.model, grouping) if grouping is not None else None
        self.colocated: ColocatedEngine | None = None
        if self.hybrid is not None and generation.engine == "vllm":
            self.colocated = ColocatedVllm(self.hybrid, model, generation, seed, sleeps=sleeps)
        elif self.hybrid is not None:
            self.colocated = ColocatedTorch(self.hybrid, generation, seed, self._vocabulary)

    # --- generating

    def generate(self, prompts: Prompts, *, sampling: Sampling) -> Partial[Rollouts]:
        """Sample this generation replica's rows, perhaps none, with the current weights; those that don't fit fail.

        A row's tokens do not depend on the ranks that sample it. The ranks switch for it and back, unless they have
        switched already. Raises RuntimeError without a layout to generate in, ValueError for a row that was admitted
        at a version newer than the weights.
        """
        if len(prompts) and (oldest := int(prompts.min_versions.max())) > self.trained.version:
            raise ValueError(
                f"a prompt of version {oldest} can't be generated by weights of version {self.trained.version}"
            )
        if self.colocated is None:
            return generate_all(self.engine(term=0), prompts, sampling)
        if self.colocated.generating:
            return self.colocated.generate(prompts, sampling) or NOT_COLLECTED
        self.to_generation()
        try:
            return self.colocated.generate(prompts, sampling) or NOT_COLLECTED
        finally:
            self.to_training()

    def to_generation(self) -> Transition | None:
        """See ColocatedEngine.publish. Raises RuntimeError without a layout to generate in."""
        return self._regrouped().publish(self.trained.version, self.probe)

    def to_training(self) -> None:
        """See ColocatedEngine.release."""
        self._regrouped().release()

    def engine(self, term: int) -> TorchEngine:
        """An engine that runs this very model, at its current version; `load_in_place` after an update.

        Raises RuntimeError where several ranks share the model, or one holds it as shards.
        """
        if self.model.topology.world_size > 1:
            raise RuntimeError("this policy was given no generation layout: it trains and answers, others generate")
        version = Version(term, self.trained.version)
        return OwnEngine(
            self.model.module, self._generation, self._seed, self._vocabulary, self.offloader, version=version
        )

    def _regrouped(self) -> ColocatedEngine:
        if self.colocated is None:
            raise RuntimeError("this policy was given no generation layout: it trains and answers, others generate")
        return self.colocated

    # --- answering and learning

    def log_probs(self, rollouts: Rollouts) -> LogProbs:
        """Log-probs of this replica's rows under the current weights, of the distribution that is sampled from."""
        log_probs = self._log_probs(rollouts)
        if log_probs is None or not self.model.is_output_rank:
            return NOT_COLLECTED
        return LogProbs(sample_ids=rollouts.sample_ids, log_probs=log_probs)

    def update(self, experience: Experience) -> Metrics:
        """epochs x mini_batches optimizer steps on all replicas' rows. `experience` has this replica's, possibly none.

        The metrics are those of all rows on every replica, so that their mean is what one device measures.
        Raises StepRefused, on every rank, and changes nothing, where a loss or a gradient is not finite.
        """
        # With several optimizer steps the trust region stands around the weights at the start of the step.
        several = self._loss.epochs * self._loss.mini_batches > 1
        old_log_probs = self._log_probs(experience) if several else None
        measured: dict[str, float] = {}

        def batch_loss(batch: Experience, weights: Jagged) -> MicroLoss:
            start = _start_of(batch, experience, old_log_probs) if old_log_probs is not None else None
            return self._micro_loss(batch, weights, start, measured)

        text = self._text.rows if self._text is not None else None
        taken = self.trained.learn("policy.update", experience, self._loss, self._seed, batch_loss, text)
        total = self.trained.over_replicas(measured) | taken
        return Metrics(values=mean_metrics(total)) if self.model.is_output_rank else NOT_COLLECTED

    def _micro_loss(
        self, batch: Experience, weights: Jagged, old_log_probs: Jagged | None, measured: dict[str, float]
    ) -> MicroLoss:
        """The loss of a mini-batch's micro-batches; what they measure is added to `measured`.

        With pretraining text: L = L_RL + ptx_coefficient * mean of -log p(token) over the text's tokens (Ouyang et al.
        2022, ptx), at temperature 1, since the text was written and not sampled.
        """
        of_text = self._text.weights(batch) if self._text is not None else None

        def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
            tokens, plain = self._tokens(outputs, micro, batch, old_log_probs, plain=of_text is not None)
            objective = policy_objective(self._policy_loss.current, tokens, self._loss)
            accumulate(measured, loss_metrics(tokens, objective, self._loss))
            reinforced = reduce_loss(objective.loss, micro.column(weights))
            if of_text is None or plain is None:
                return reinforced
            cross_entropy = reduce_loss(-plain, micro.column(of_text))
            accumulate(measured, {"ptx_loss": cross_entropy.item()})
            return reinforced + self._loss.ptx_coefficient * cross_entropy

        return loss

    def _tokens(
        self, outputs: Outputs, micro: MicroBatch, batch: Experience, old_log_probs: Jagged | None, *, plain: bool
    ) -> tuple[Tokens, Tensor | None]:
        """What the loss reads of the response tokens; with `plain` also their log-probs at temperature 1."""
        entropy, measured, measures = self._loss.entropy_coefficient != 0.0, list[Tensor](), True

        def read(logits: Tensor, tokens: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
            processed = self._distribution.processed_with(logits, tokens, indices)
            found = [log_softmax_of(processed, tokens)]
            if entropy:
                found.append(token_entropies(self._distribution.processed(logits, indices)))
            elif measures:
                measured.append(measured_entropies(processed.detach(), tokens, found[0].detach()))
            if plain:
                found.append(log_softmax_of(logits, tokens))
            return tuple(found)

        log_probs, *others = outputs.of_responses(micro, read)
        measures = False  # the backward pass reads the chunks again
        tokens = Tokens(
            log_probs=log_probs,
            old_log_probs=micro.column(old_log_probs) if old_log_probs is not None else log_probs.detach(),
            rollout_log_probs=micro.column(batch.log_probs),
            advantages=micro.column(batch.advantages),
            mask=micro.column(batch.loss_mask) != 0,
            lengths=micro.tensor(micro.response_lengths),
            reference=micro.column(batch.reference),
            entropies=others[0] if entropy else torch.cat(measured),
        )
        return tokens, others[-1] if plain else None

    def _log_probs(self, rows: Rollouts | Experience) -> Jagged | None:
        """Log-probs of the response tokens, on every rank of the last stage."""
        budget = self._loss.tokens_per_micro_batch
        values = self.model.outputs(rows, budget, self._distribution.of_responses)
        return response_column(rows.responses, rows.loss_mask, values) if values is not None else None

    # --- publishing and keeping

    def snapshot(self, version: Version) -> PackedWeights:
        """The canonical tensors as one buffer, with their digests and the answer to the probe batch, on rank 0.

        Adapters are merged, or published alone where the recipe wants that; the probe is answered by the merged
        weights, which an engine has in either case. The buffer is a copy: the next optimizer step may start when this
        returns.
        """
        alone = self.model.adapters if self._publishes_adapters else None
        with merged(self.model):
            probe = self.probe()
            if alone is None:
                tensors = self.trained.collect()
                return PackedWeights.publish(version, tensors, probe) if self.model.rank == 0 else NOT_COLLECTED
        tensors = self.trained.collect_adapters()
        return PackedWeights.publish(version, tensors, probe, alone.scaling) if tensors else NOT_COLLECTED

    def probe(self) -> Probe:
        """The probe batch and this model's answer to it, on every rank: who loads its weights must answer alike.

        A run has the same batch wherever the policy is trained. Ids that stand for no token are not in it.
        """
        tolerance = self._generation.probe_tolerance
        return answered_probe(self.model, self._probe_tokens, self._seed, tolerance, self._vocabulary)

    def save(self, folder: str) -> None:
        """See TrainableModel.save."""
        self.trained.save(folder)

    def load(self, folder: str) -> None:
        """See TrainableModel.load."""
        self.trained.load(folder)
        if self.colocated is not None:
            self.colocated.restored()

    def export(self, folder: str) -> None:
        """See TrainableModel.export."""
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


def _start_of(batch: Experience, experience: Experience, old_log_probs: Jagged) -> Jagged:
    """`old_log_probs` of the batch's rows, which are some of the experience's; pretraining text has none."""
    text = is_text(batch)
    start = old_log_probs.take(rows_of(experience, batch.sample_ids[~text]))
    texts = batch.responses.take(np.flatnonzero(text))
    return Jagged.concat([start, texts.with_values(np.zeros(len(texts.values), np.float32))])
