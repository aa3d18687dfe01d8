"""vLLM, stepped by its owner in this process, so that a load stands between two steps.

A load takes the running rows back with the tokens that they have, installs, drops every key and value of the old
weights, answers the probe, and only then sends the rows on from where they were. So a token's log-prob is
always that of one version's forward over everything before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocols.data.ids import sampling_seed
from protocols.data.messages import Finish, Prompts
from protocols.roles import Sampling
from protocols.weights import BadWeights, InstallReceipt, Probe, Version, WeightManifest
from workers.data.hf_folder import end_of_sequence
from workers.generation.engine import Engine, FinishedRow, refuse_unfit
from workers.generation.engine_devices import IN_PROCESS, EngineDevices
from workers.generation.publication import check_publication, read_tensors, refuse_misfits, shapes_of, verify_installed
from workers.generation.vllm_internals import (
    SharedPart,
    finish_reload,
    load_shared,
    load_tensors,
    repack_head,
    scheduler_of,
    shut_down,
    start,
    start_reload,
    token_prompt,
    zero_kv_cache,
)
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
    `eos_token_id` ends a response; by default the folder names it. `place` says in which processes it computes; where
    it is this one, that must be no rank among others. An engine that `sleeps` can be put to sleep, on CUDA. One engine
    a process.
    """

    def __init__(
        self,
        path: str,
        settings: Generation,
        run_seed: int,
        dtype: str = "float32",
        eos_token_id: int | None = None,
        *,
        place: EngineDevices = IN_PROCESS,
        sleeps: bool = False,
    ) -> None:
        self._owns_process_group = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if not (place.workers or self._owns_process_group) and (ranks := torch.distributed.get_world_size()) > 1:
            raise ValueError(f"this process is one of {ranks} ranks, which vLLM takes for its own: give it workers")
        self.workers = place.workers
        self._sleeps = sleeps and torch.cuda.is_available()
        self._vllm: LLMEngine | None = start(path, settings, dtype, place, self._sleeps)
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
        self._rounds = 0  # how often rows were taken back: vLLM never sees a request id twice
        self._taking: Version | None = None  # that arrives in parts
        self._taken, self._started = 0, 0.0
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
        self._retire(manifest.version)
        weights = {"weights_iterator": read_tensors(manifest, buffer), "is_checkpoint_format": True}
        self._reload(manifest.version, "reload_weights", kwargs=weights)
        difference = self._verify_installed(manifest.version, manifest.probe)
        self._shapes = shapes_of(manifest)
        return InstallReceipt(manifest.version, len(manifest.tensors), difference, time.perf_counter() - started)

    def start_taking(self, version: Version) -> None:
        """Begin to install weights that come in parts, between two steps; `take` them, then `finish_taking`.

        Raises BadWeights, and changes nothing, where the version is not newer than the one that is installed, or where
        an earlier one was begun and not finished: layers then wait for tensors that no later version brings.
        """
        if self._taking is not None:
            raise BadWeights(f"version {self._taking} was begun and never finished: start a new engine")
        if self._newest is not None and version <= self._newest:
            raise BadWeights(f"version {version} is not newer than {self._newest}, which is installed")
        self._retire(version)
        self._taking, self._taken, self._started = version, 0, time.perf_counter()
        self._reload(version, start_reload)

    def take(self, part: Mapping[str, Tensor] | Sequence[SharedPart]) -> None:
        """Install whole modules: tensors by checkpoint name, or where the workers of a group find the shards of each.

        Tensors need a worker in this process. They are read before this returns. Raises BadWeights where vLLM breaks
        on them, RuntimeError outside of start and finish.
        """
        if self._taking is None:
            raise RuntimeError("parts of weights are taken between start_taking and finish_taking")
        self._taken += len(part)
        if isinstance(part, Mapping):
            self._reload(self._taking, load_tensors, args=(list(part.items()),))
        else:
            self._reload(self._taking, load_shared, args=(list(part),))

    def finish_taking(self, version: Version, probe: Probe | None) -> InstallReceipt:
        """Serve the weights once they answer the probe. Raises BadWeights where they don't; see `load`."""
        if self._taking != version:
            raise RuntimeError(f"version {version} can't be finished: {self._taking} is being taken")
        self._taking = None
        self._reload(version, finish_reload)
        difference = self._verify_installed(version, probe)
        return InstallReceipt(version, self._taken, difference, time.perf_counter() - self._started)

    def sleep(self) -> None:
        """Give the device's memory to others until `wake`: the KV cache goes, the weights wait in the host's.

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

    def statistics(self) -> dict[str, float]:
        scheduler = scheduler_of(self._engine)
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

    def _retire(self, version: Version) -> None:
        """Take the running rows back and serve nothing: the old weights are going."""
        self._take_back_running()
        if self._newest is not None and version.term != self._newest.term:
            for row in self._waiting.values():
                row.tokens, row.log_probs, row.versions = [], [], []
        self._version = None

    def _take_back_running(self) -> None:
        self._engine.abort_request(list(self._running))
        self._waiting.update((row.sample_id, row) for row in self._running.values())
        self._running.clear()
        self._rounds += 1

    def _reload(self, version: Version, step: str | Callable[..., None], **arguments: Any) -> None:
        """One step of a reload, on all workers. Raises BadWeights, and closes the engine, where it breaks off."""
        try:
            self._engine.collective_rpc(step, **arguments)
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            self.close()  # a reload that broke off leaves layers without tensors: no later one repairs them
            raise BadWeights(f"version {version} broke vLLM's reload, start a new engine: {error!r}") from error

    def _verify_installed(self, version: Version, probe: Probe | None) -> float:
        """Serve what was reloaded, if it answers as the trainer does; the largest difference of log-probs."""
        self._engine.collective_rpc(repack_head)
        if not self._engine.reset_prefix_cache():  # it hashes tokens, not weights
            raise RuntimeError(
                "vLLM kept its prefix cache although no request runs: old keys and values would be reused"
            )
        try:
            difference = verify_installed(probe, self._answer)
        except BadWeights:
            self._engine.collective_rpc(zero_kv_cache)
            raise
        self._version = self._newest = version
        return difference

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
