"""An engine over a transformers module: a static batch with a KV cache, run to its end at one version.

Each row samples by inverting its cumulative distribution at one uniform per token, from a Philox stream of its own.
So only the rounding of its logits depends on the other rows of the batch, and the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from protocols.data.ids import sampling_seed
from protocols.data.messages import Finish, Prompts
from protocols.roles import Sampling
from protocols.weights import Version
from workers.data.model_config import UNBOUNDED_CONTEXT, context_in
from workers.data.vocabulary import Vocabulary
from workers.generation.engine import Engine, FinishedRow, refuse_unfit
from workers.generation.in_place import InPlaceWeights
from workers.generation.next_tokens import NextTokens
from workers.generation.publication import Part, Publication
from workers.generation.shared_buffer import SharedTensors
from workers.generation.stop_texts import StopTexts
from workers.settings import Generation
from workers.training.checkpoint_names import CheckpointNames
from workers.training.models import canonical_shapes, tensors_in_memory
from workers.training.token_distribution import TokenDistribution


class QueuedRow(msgspec.Struct, frozen=True):
    """A row that waits for a step."""

    sample_id: int
    prompt: npt.NDArray[np.int32]  # [P]
    sampling: Sampling
    retry: int


class TorchEngine(Engine):
    """Generates with a module that it owns, or with one that its owner trains between two steps.

    An engine that owns its module receives weights. With a module that is trained it loads `InPlaceWeights` after each
    committed step. `vocabulary` has the tokens that end a response, and the text of them all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Generation,
        run_seed: int,
        vocabulary: Vocabulary,
        *,
        owns_model: bool = True,
        version: Version | None = None,
    ) -> None:
        self._own = tensors_in_memory(model) if owns_model else {}
        super().__init__(version, canonical_shapes(model) if owns_model else None)
        self._model: PreTrainedModel | None = model
        self._slots = settings.slots
        self._run_seed = run_seed
        self._vocabulary = vocabulary
        self._owns_model = owns_model
        self._context = settings.max_model_tokens or context_in(model.config.to_dict()) or UNBOUNDED_CONTEXT
        self._queue: dict[int, QueuedRow] = {}
        self._previous: dict[str, Tensor] = {}  # while a load is not verified

    @property
    def unfinished(self) -> int:
        return len(self._queue)

    def submit(self, prompts: Prompts, sampling: Sampling, retry: int = 0) -> None:
        refuse_unfit(prompts, sampling, self._queue, self._context, self._module.config.vocab_size)
        StopTexts.of(sampling, self._vocabulary)
        for sample_id, prompt in zip(prompts.sample_ids.tolist(), prompts.prompts, strict=True):
            self._queue[sample_id] = QueuedRow(sample_id, prompt, sampling, retry)

    def step(self) -> list[FinishedRow]:
        """Run up to `slots` queued rows, lowest ids first, to their end. Raises RuntimeError before the first load."""
        if not self._queue:
            return []
        if self._version is None:
            raise RuntimeError(f"{len(self._queue)} rows wait, but no weights are installed: load a version first")
        rows = [self._queue[sample_id] for sample_id in sorted(self._queue)[: self._slots]]
        was_training = self._module.training
        self._module.eval()
        try:
            finished = self._generate(rows, self._version.step)
        finally:
            self._module.train(was_training)
        for row in rows:
            del self._queue[row.sample_id]
        return finished

    def abort(self) -> None:
        self._queue.clear()

    def _start_load(self, weights: Publication) -> None:
        """Raises RuntimeError for weights that are sent to a trained module, and the other way round."""
        if isinstance(weights, InPlaceWeights) and self._owns_model:
            raise RuntimeError(
                f"version {weights.version} is not in this module, which the engine owns: send it weights"
            )
        if not isinstance(weights, InPlaceWeights) and not self._owns_model:
            raise RuntimeError(f"version {weights.version} can't be loaded into a module that its owner trains")
        self._previous = {name: tensor.clone() for name, tensor in self._own.items()}

    def _install(self, part: Part) -> int:
        count = 0

        def read() -> Iterator[tuple[str, Tensor]]:
            nonlocal count
            for named in part.on_device(self._module.device) if isinstance(part, SharedTensors) else part:
                count += 1
                yield named

        for name, tensor in CheckpointNames(self._module).to_memory(read()):
            self._own[name].copy_(tensor)
        return count

    def _empty_caches(self) -> None:
        """Nothing to drop: a batch runs from its prompts to its end within one step."""

    def _end_load(self, *, verified: bool) -> None:
        for name, tensor in self._previous.items() if not verified else ():
            self._own[name].copy_(tensor)
        self._previous = {}

    def close(self) -> None:
        self._queue.clear()
        self._own, self._version, self._model = {}, None, None

    @property
    def _module(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        return self._model

    @torch.no_grad()  # not inference_mode: a buffer that the module caches here must stay usable for training
    def _generate(self, rows: list[QueuedRow], version_step: int) -> list[FinishedRow]:
        device = self._module.device
        limits = torch.tensor([row.sampling.max_tokens for row in rows], device=device)
        uniforms = torch.from_numpy(self._uniforms(rows)).to(device)
        following = NextTokens([row.sampling for row in rows], uniforms, self._vocabulary)
        tokens = torch.zeros(uniforms.shape, dtype=torch.int64, device=device)
        log_probs = torch.zeros(uniforms.shape, dtype=torch.float32, device=device)
        lengths = torch.zeros(len(rows), dtype=torch.int64, device=device)
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)

        cache = DynamicCache(config=self._module.config)
        inputs, mask = (column.to(device) for column in _left_padded([row.prompt for row in rows]))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        alive = torch.arange(len(rows), device=device)
        for t in range(uniforms.shape[1]):
            logits = self._next_logits(inputs, mask, positions, cache)
            sampled, log_probs[alive, t], stopped[alive] = following.sample(logits, alive, t)
            tokens[alive, t], lengths[alive] = sampled, t + 1
            self.tokens += len(sampled)
            going = (~stopped[alive] & (limits[alive] > t + 1)).nonzero().squeeze(-1)
            if len(going) == 0:
                break
            if len(going) < len(alive):  # finished rows leave, so that nothing is computed for them
                cache.batch_select_indices(going)
                alive, mask, sampled = alive[going], mask[going], sampled[going]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            inputs, positions = sampled.unsqueeze(1), mask.sum(1, keepdim=True) - 1
        finishes = [Finish.STOP if ended else Finish.LENGTH for ended in stopped.tolist()]
        columns = tokens.cpu().numpy(), log_probs.cpu().numpy(), lengths.tolist(), finishes
        return [
            FinishedRow(
                sample_id=row.sample_id,
                tokens=row_tokens[:length].astype(np.int32),
                log_probs=row_log_probs[:length].copy(),
                versions=np.full(length, version_step, np.int32),
                finish=finish,
            )
            for row, row_tokens, row_log_probs, length, finish in zip(rows, *columns, strict=True)
        ]

    def _next_logits(self, inputs: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the token after the last input, [n, V]; the cache grows by the inputs."""
        outputs = self._module(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]

    def _uniforms(self, rows: list[QueuedRow]) -> npt.NDArray[np.float64]:
        """One uniform a token, [n, longest max_tokens]; a row's stream depends on its seed alone."""
        width = max(row.sampling.max_tokens for row in rows)
        seeds = (sampling_seed(self._run_seed, row.sample_id, row.retry) for row in rows)
        return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(width) for seed in seeds])

    @torch.no_grad()
    def _answer(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of each sequence's tokens but the first."""
        answers, plain = list[list[float]](), TokenDistribution(Sampling(), self._vocabulary)
        for sequence in sequences:
            inputs = torch.tensor([sequence], device=self._module.device)
            logits = self._module(input_ids=inputs, use_cache=False).logits[0, :-1]
            answers.append(plain.log_probs(logits, inputs[0, 1:], 0).tolist())
        return answers


def _left_padded(prompts: list[npt.NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, int64 [n, longest]: every row ends at the right edge, where the next token is sampled."""
    rows = [torch.from_numpy(prompt.astype(np.int64)) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows), pad([torch.ones_like(row) for row in rows])
