"""vLLM in this process, stepped by its owner, so that a load stands between two steps.

A load takes the running rows back with the tokens that they have, installs, drops every key and value of the old
weights, answers the probe, and only then sends the rows on from where they were. So a token's log-prob is
always that of one version's forward over everything before it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from protocols.ids import sampling_seed
from protocols.messages import Finish, Prompts
from protocols.roles import Sampling
from protocols.weights import BadWeights, InstallReceipt, Version, WeightManifest
from workers.folders import context_of, end_of_sequence
from workers.generation.engine import Engine, FinishedRow, refuse_unfit
from workers.generation.publication import check_publication, prove, read_tensors, refuse_misfits, shapes_of
from workers.settings import Generation

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams


class _Row(msgspec.Struct):
    """An unfinished row and what has been drawn of it, over however many versions."""

    sample_id: int
    prompt: list[int]
    sampling: Sampling
    retry: int
    tokens: list[int] = []
    log_probs: list[float] = []
    versions: list[int] = []


class VllmEngine(Engine):
    """Generates with vLLM on the CPU or on CUDA, whichever this installation of vLLM is for.

    Only the shape of the model in the folder `path` counts: it serves nothing until weights are published to it.
    `eos_token_id` ends a response; by default the folder names it. One engine a process.
    """

    def __init__(
        self, path: str, settings: Generation, run_seed: int, dtype: str = "float32", eos_token_id: int | None = None
    ) -> None:
        self._owns_process_group = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self._vllm: LLMEngine | None = _start(path, settings, dtype)
        model = self._vllm.vllm_config.model_config
        self._context = int(model.max_model_len)
        self._vocabulary = int(model.get_vocab_size())
        self._eos_token_id = end_of_sequence(path) if eos_token_id is None else eos_token_id
        self._run_seed = run_seed
        self._version: Version | None = None
        self._newest: Version | None = None  # the last version proven, also while a refused one keeps the engine silent
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the first version proven: all later ones are alike
        self._waiting: dict[int, _Row] = {}
        self._running: dict[str, _Row] = {}  # by vLLM's request id
        self._loads = 0
        self._tokens_generated = 0

    @property
    def version(self) -> Version | None:
        return self._version

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def submit(self, prompts: Prompts, sampling: Sampling, retry: int = 0) -> None:
        taken = self._waiting.keys() | {row.sample_id for row in self._running.values()}
        refuse_unfit(prompts, sampling, taken, self._context, self._vocabulary)
        for sample_id, prompt in zip(prompts.sample_ids.tolist(), prompts.prompts, strict=True):
            self._waiting[sample_id] = _Row(sample_id, prompt.tolist(), sampling, retry)

    def step(self) -> list[FinishedRow]:
        """One forward for all running rows. Raises RuntimeError while no proven weights are installed."""
        if not self.unfinished:
            return []
        if self._version is None:
            raise RuntimeError(
                f"{self.unfinished} rows wait, but no proven weights are installed: load a version first"
            )
        self._admit_waiting()
        finished: list[FinishedRow] = []
        for output in self._engine.step():
            row = self._running[output.request_id]
            reason = _extend(row, output, self._version.step)
            if reason is not None:
                del self._running[output.request_id]
                finished.append(_finished(row, reason))
        self._tokens_generated += sum(len(row.tokens) for row in finished)
        return finished

    def load(self, manifest: WeightManifest, buffer: npt.NDArray[np.uint8]) -> InstallReceipt:
        """Install between two steps.

        A refusal by the probe leaves the engine without a version, since the old weights are gone: it serves nothing,
        keeps its rows, and goes on with the next version that is proven. Rows begin anew where the version is of
        another term: what an abandoned lineage drew is dropped.
        """
        started = time.perf_counter()
        check_publication(manifest, buffer, self._newest)
        if self._shapes is not None:
            refuse_misfits(manifest, self._shapes)
        self._take_back_running()
        if self._newest is not None and manifest.version.term != self._newest.term:
            for row in self._waiting.values():
                row.tokens, row.log_probs, row.versions = [], [], []
        self._version = None
        self._loads += 1
        try:
            self._install(manifest, buffer)
            difference = prove(manifest.probe, self._answer)
        except BadWeights:
            if self._vllm is not None:
                self._vllm.collective_rpc(_zero_kv_cache)
            raise
        self._version = self._newest = manifest.version
        self._shapes = shapes_of(manifest)
        return InstallReceipt(manifest.version, len(manifest.tensors), difference, time.perf_counter() - started)

    def statistics(self) -> dict[str, float]:
        scheduler = _scheduler(self._engine)
        running, waiting = scheduler.get_request_counts()
        return {
            "running": float(running),
            "waiting": float(waiting + len(self._waiting)),
            "tokens_generated": float(self._tokens_generated),
            "kv_cache_used_ratio": float(scheduler.kv_cache_manager.usage),
        }

    def close(self) -> None:
        if self._vllm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        engine, self._vllm, self._version = self._vllm, None, None
        self._waiting.clear()
        self._running.clear()
        engine.engine_core.shutdown()
        if self._owns_process_group:  # else it is the owner's, and vLLM's groups end with it
            cleanup_dist_env_and_memory()

    @property
    def _engine(self) -> LLMEngine:
        if self._vllm is None:
            raise RuntimeError("the engine is closed")
        return self._vllm

    def _admit_waiting(self) -> None:
        """Give all waiting rows to vLLM in id order, so that the order of submission decides nothing."""
        for sample_id in sorted(self._waiting):
            row = self._waiting.pop(sample_id)
            request_id = f"{sample_id}.{self._loads}"
            self._running[request_id] = row
            self._engine.add_request(request_id, _token_prompt(row.prompt + row.tokens), self._parameters(row))

    def _parameters(self, row: _Row) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=row.sampling.max_tokens - len(row.tokens),
            temperature=row.sampling.temperature,
            seed=sampling_seed(self._run_seed, row.sample_id, row.retry, token=len(row.tokens)),
            stop_token_ids=[self._eos_token_id],
            logprobs=0,  # of the drawn token only
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _take_back_running(self) -> None:
        self._engine.abort_request(list(self._running))
        self._waiting.update((row.sample_id, row) for row in self._running.values())
        self._running.clear()

    def _install(self, manifest: WeightManifest, buffer: npt.NDArray[np.uint8]) -> None:
        weights = {"weights_iterator": read_tensors(manifest, buffer), "is_checkpoint_format": True}
        try:
            self._engine.collective_rpc("reload_weights", kwargs=weights)
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            self.close()  # a reload that broke off leaves layers without tensors: no later one repairs them
            raise BadWeights(
                f"version {manifest.version} broke vLLM's reload, start a new engine: {error!r}"
            ) from error
        self._engine.collective_rpc(_repack_head)
        if not self._engine.reset_prefix_cache():  # it hashes tokens, not weights
            raise RuntimeError(
                "vLLM kept its prefix cache although no request runs: old keys and values would be reused"
            )

    def _answer(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of each sequence's tokens but the first, computed as vLLM computes a prompt's."""
        from vllm import SamplingParams

        for i, sequence in enumerate(sequences):
            parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            self._engine.add_request(f"probe{i}.{self._loads}", _token_prompt(sequence), parameters)
        answers: dict[str, list[float]] = {}
        while len(answers) < len(sequences):
            outputs: list[Any] = self._engine.step()
            for output in outputs:
                if output.finished:
                    tokens, positions = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
                    answers[output.request_id] = [p[token].logprob for token, p in zip(tokens, positions, strict=True)]
        return [answers[f"probe{i}.{self._loads}"] for i in range(len(sequences))]


def _extend(row: _Row, output: Any, version_step: int) -> str | None:
    """Add what one step drew; vLLM's finish reason, None while the row goes on."""
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    row.tokens += tokens
    row.log_probs += [position[token].logprob for token, position in zip(tokens, completion.logprobs, strict=True)]
    row.versions += [version_step] * len(tokens)
    return completion.finish_reason


def _finished(row: _Row, reason: str) -> FinishedRow:
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


# Everything that depends on vLLM's version or internals stands below (written for 0.24 and newer).

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # else some versions compile for half a minute at the first request with log-probs
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine of a machine to the same core
}
_CPU_BLOCK_TOKENS = 32  # the least that its attention is fast for; the default of 128 holds four times fewer short rows
_CPU_BATCHED_TOKENS = 4096  # of prompts in one step


def _start(path: str, settings: Generation, dtype: str) -> LLMEngine:
    """vLLM's engine in this process. Some settings have no place but the environment; what the user set stays."""
    on_cpu = not torch.cuda.is_available()
    for name, value in {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if on_cpu else {})}.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no preference: loads between steps rely on it
    if on_cpu:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch, already loaded, reads the variable no more

    from vllm import EngineArgs, LLMEngine

    limits: dict[str, Any] = {}
    if on_cpu:
        # A prompt cut into chunks takes back a seeded draw, which generators on the CPU can't: prompts run whole.
        whole = max(_CPU_BATCHED_TOKENS, settings.max_model_tokens or context_of(path))
        limits = {"block_size": _CPU_BLOCK_TOKENS, "enable_chunked_prefill": False, "max_num_batched_tokens": whole}
    if settings.max_model_tokens:
        limits["max_model_len"] = settings.max_model_tokens
    arguments = EngineArgs(
        model=path,
        dtype=dtype,  # type: ignore[arg-type]
        load_format="dummy",  # weights come by publication
        skip_tokenizer_init=True,
        generation_config="vllm",  # not the folder's sampling defaults
        max_num_seqs=settings.slots,
        kv_cache_memory_bytes=settings.kv_cache_bytes,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",  # at the sampling temperature
        enforce_eager=on_cpu,
        async_scheduling=False,  # a step's tokens are out before the next: nothing is in flight at a load
        disable_log_stats=True,
        seed=0,
        **limits,
    )
    return LLMEngine.from_engine_args(arguments)


def _token_prompt(tokens: list[int]) -> Any:
    """A prompt that is already tokenized."""
    return {"type": "token", "prompt_token_ids": tokens}


def _scheduler(engine: LLMEngine) -> Any:
    core: Any = engine.engine_core
    return core.engine_core.scheduler


def _repack_head(worker: Any) -> None:
    """Pack the output head's weight anew.

    On the CPU its kernel reads a packed copy. A publication of tied weights holds no tensor of the head's own, and
    vLLM's reload then leaves that copy as it was.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _zero_kv_cache(worker: Any) -> None:
    """Forget what refused weights computed: a NaN outlives its block, since masked positions are multiplied by 0."""
    for tensor in worker.model_runner.kv_caches:
        tensor.zero_()
