"""An engine over vLLM. Its owner calls every step of it in this process, so weights are loaded between two steps.

A load removes the running rows with their tokens from vLLM, installs the weights, empties the KV cache and answers the
probe. Then the rows continue where they were. So a token's log-prob always comes
from one version's forward pass over everything before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from protocols.data.ids import sampling_seed
from protocols.data.messages import Finish, Prompts
from protocols.roles import Sampling
from protocols.weights import BadWeights, Version
from workers.data.vocabulary import Vocabulary
from workers.generation.engine import Engine, FinishedRow, refuse_unfit
from workers.generation.engine_devices import IN_PROCESS, EngineDevices
from workers.generation.publication import Part, Publication
from workers.generation.shared_buffer import SharedTensors
from workers.generation.stop_texts import StopTexts
from workers.generation.vllm_internals import (
    begin_load,
    finish_load,
    hide_tokens,
    load_shared,
    load_tensors,
    reprocess_head,
    shut_down,
    start,
    token_prompt,
    zero_kv_cache,
)
from workers.settings import Generation, refuse_in_vllm

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams


class UnfinishedRow(msgspec.Struct):
    """A row and its tokens so far, which may be of several versions."""

    sample_id: int
    prompt: list[int]
    sampling: Sampling
    retry: int
    stops: StopTexts | None  # None: no text ends the row
    tokens: list[int] = []
    log_probs: list[float] = []
    versions: list[int] = []


class VllmEngine(Engine):
    """Generates with vLLM on the CPU or on CUDA, whichever this installation of vLLM is for.

    Only the shape of the model in the folder `path` matters: `load` brings the weights. `vocabulary` has the tokens
    that end a response, beside the folder's own, and the text of them all; by default it is the folder's. `devices`
    says in which processes the engine computes; if that is this process, it must not be one rank of several. An engine
    that `sleeps` can free its CUDA memory. A process has one engine at a time: a second one raises RuntimeError.
    """

    def __init__(
        self,
        path: str,
        settings: Generation,
        run_seed: int,
        dtype: str = "float32",
        vocabulary: Vocabulary | None = None,
        *,
        devices: EngineDevices = IN_PROCESS,
        sleeps: bool = False,
    ) -> None:
        super().__init__()
        self._owns_process_group = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if not (devices.workers or self._owns_process_group) and (ranks := torch.distributed.get_world_size()) > 1:
            raise ValueError(f"this process is one of {ranks} ranks, which vLLM takes for its own: give it workers")
        self.workers = devices.workers
        self._sleeps = sleeps and torch.cuda.is_available()
        self._vllm: LLMEngine | None = start(path, settings, dtype, devices, self._sleeps)
        model = self._vllm.vllm_config.model_config
        self._context = int(model.max_model_len)
        self._rows = int(model.get_vocab_size())
        self._vocabulary = Vocabulary.of(path) if vocabulary is None else vocabulary
        hide: Callable[..., None] = hide_tokens
        self._vllm.collective_rpc(hide, args=(self._vocabulary.unknown(self._rows),))
        self._run_seed = run_seed
        self._waiting: dict[int, UnfinishedRow] = {}
        self._running: dict[str, UnfinishedRow] = {}  # by vLLM's request id
        self._rounds = 0  # how often rows were taken back: vLLM never sees a request id twice

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def submit(self, prompts: Prompts, sampling: Sampling, retry: int = 0) -> None:
        taken = self._waiting.keys() | {row.sample_id for row in self._running.values()}
        refuse_in_vllm("temperature", sampling.temperature)
        refuse_unfit(prompts, sampling, taken, self._context, self._rows)
        for sample_id, prompt in zip(prompts.sample_ids.tolist(), prompts.prompts, strict=True):
            stops = StopTexts.of(sampling, self._vocabulary)
            self._waiting[sample_id] = UnfinishedRow(sample_id, prompt.tolist(), sampling, retry, stops)

    def step(self) -> list[FinishedRow]:
        """One forward for all running rows. Raises RuntimeError while no verified weights are installed."""
        if not self.unfinished:
            return []
        if self._version is None:
            raise RuntimeError(
                f"{self.unfinished} rows wait, but no verified weights are installed: load a version first"
            )
        self._admit_waiting()
        finished: list[FinishedRow] = []
        for output in self._engine.step():
            row = self._running[output.request_id]
            before = len(row.tokens)
            reason = _extend(row, output, self._version.step)
            self.tokens += len(row.tokens) - before
            if row.stops is not None and row.stops.completed_by(row.tokens[-1]):
                if reason is None:
                    self._engine.abort_request([output.request_id])
                reason = "stop"
            if reason is not None:
                del self._running[output.request_id]
                finished.append(_finished_row(row, reason))
        return finished

    def abort(self) -> None:
        self._take_back_running()
        self._waiting.clear()

    def sleep(self) -> None:
        """Free the device's memory until `wake`: the KV cache is dropped, the weights wait in the host's memory.

        Rows that run go on afterwards from the tokens that they have. Nothing happens on the CPU, nor in an engine
        that was not started to sleep.
        """
        self._take_back_running()
        if self._sleeps:
            self._engine.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._sleeps:
            self._engine.wake_up()

    def close(self) -> None:
        if self._vllm is None:
            return
        engine, self._vllm, self._version = self._vllm, None, None
        self._waiting.clear()
        self._running.clear()
        shut_down(engine, self._owns_process_group)

    @property
    def _engine(self) -> LLMEngine:
        if self._vllm is None:
            raise RuntimeError("the engine is closed")
        return self._vllm

    def _admit_waiting(self) -> None:
        """Give all waiting rows to vLLM in id order, so that the order of submission decides nothing."""
        for sample_id in sorted(self._waiting):
            row = self._waiting.pop(sample_id)
            request_id = f"{sample_id}.{self._rounds}"
            self._running[request_id] = row
            self._engine.add_request(request_id, token_prompt(row.prompt + row.tokens), self._parameters(row))

    def _parameters(self, row: UnfinishedRow) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling, done = row.sampling, len(row.tokens)
        ends = self._vocabulary.ends.union(sampling.stop_token_ids)
        return SamplingParams(
            max_tokens=sampling.max_tokens - done,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            min_tokens=max(sampling.min_tokens - done, 0),
            seed=sampling_seed(self._run_seed, row.sample_id, row.retry, token=done),
            stop_token_ids=sorted(token for token in ends if token < self._rows),  # others are never sampled
            logprobs=0,  # of the sampled token only
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _start_load(self, weights: Publication) -> None:
        """Take the running rows back and serve nothing: the old weights are overwritten from here on.

        Rows begin anew where the version is of another term: the tokens of an abandoned lineage are dropped.
        """
        self._take_back_running()
        if self._newest is not None and weights.version.term != self._newest.term:
            for row in self._waiting.values():
                row.tokens, row.log_probs, row.versions = [], [], []
                row.stops = StopTexts.of(row.sampling, self._vocabulary)
        self._version = None
        self._on_workers(weights.version, begin_load)

    def _install(self, part: Part) -> int:
        """Tensors of this process need a worker in this process; workers read shared ones themselves."""
        assert self._loading is not None
        if isinstance(part, SharedTensors):
            self._on_workers(self._loading, load_shared, part)
            return len(part.tensors)
        names: list[str] = []

        def read() -> Iterator[tuple[str, Tensor]]:  # one at a time: no second copy of them all
            for name, tensor in part:
                names.append(name)
                yield name, tensor

        self._on_workers(self._loading, load_tensors, read())
        return len(names)

    def _finish_load(self) -> None:
        assert self._loading is not None
        self._on_workers(self._loading, finish_load)
        self._engine.collective_rpc(reprocess_head)

    def _empty_caches(self) -> None:
        if not self._engine.reset_prefix_cache():  # it hashes tokens, not weights
            raise RuntimeError(
                "vLLM kept its prefix cache although no request runs: old keys and values would be reused"
            )

    def _end_load(self, *, verified: bool) -> None:
        if not verified:
            self._engine.collective_rpc(zero_kv_cache)

    def _take_back_running(self) -> None:
        self._engine.abort_request(list(self._running))
        self._waiting.update((row.sample_id, row) for row in self._running.values())
        self._running.clear()
        self._rounds += 1

    def _on_workers(self, version: Version, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step of a load on all workers. Raises BadWeights, and closes the engine, if it fails."""
        try:
            self._engine.collective_rpc(step, args=arguments)
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            self.close()  # a failed load leaves layers without tensors, and no later one repairs them
            raise BadWeights(f"version {version} broke vLLM's reload, start a new engine: {error!r}") from error

    def _answer(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of each sequence's tokens but the first, computed as vLLM computes a prompt's."""
        from vllm import SamplingParams

        for i, sequence in enumerate(sequences):
            parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            self._engine.add_request(f"probe{i}.{self._rounds}", token_prompt(sequence), parameters)
        answers: dict[str, list[float]] = {}
        while len(answers) < len(sequences):
            outputs: list[Any] = self._engine.step()
            for output in outputs:
                if output.finished:
                    tokens, positions = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
                    answers[output.request_id] = [p[token].logprob for token, p in zip(tokens, positions, strict=True)]
        return [answers[f"probe{i}.{self._rounds}"] for i in range(len(sequences))]


def _extend(row: UnfinishedRow, output: Any, version_step: int) -> str | None:
    """Add the tokens of one step; vLLM's finish reason, None while the row goes on."""
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    row.tokens += tokens
    row.log_probs += [position[token].logprob for token, position in zip(tokens, completion.logprobs, strict=True)]
    row.versions += [version_step] * len(tokens)
    return completion.finish_reason


def _finished_row(row: UnfinishedRow, reason: str) -> FinishedRow:
    if reason not in _FINISHES:
        raise RuntimeError(f"sample {row.sample_id}: vLLM ended it after {len(row.tokens)} tokens with {reason!r}")
    return FinishedRow(
        sample_id=row.sample_id,
        tokens=np.array(row.tokens, np.int32),
        log_probs=np.array(row.log_probs, np.float32),
        versions=np.array(row.versions, np.int32),
        finish=_FINISHES[reason],
    )


_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH}
