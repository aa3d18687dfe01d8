"""What depends on vLLM's version or internals (written for 0.24 and newer): starting it, and what its workers run.

The functions that take a `worker` run where vLLM computes: in this process, or in each of its worker processes.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.data.hf_folder import config_in, engine_context
from workers.data.model_config import BLOCK_TOKENS, attention_sizes, cache_bytes
from workers.generation.engine_devices import EngineDevices
from workers.generation.shared_buffer import SharedTensors
from workers.settings import Generation

if TYPE_CHECKING:
    from vllm import LLMEngine

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # else some versions compile for half a minute at the first request with log-probs
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds every engine of a machine to the same core
}
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_CPU_BATCHED_TOKENS = 4096  # of prompts in one step
# The KV cache's most of a device's memory: a GPU's free one, which the engine's own weights are not yet part of; a
# machine's whole one, which every service shares.
_CUDA_SHARE, _HOST_SHARE = 0.4, 0.1
_FALLBACK_CACHE_BYTES = 1 << 30  # for a config that does not say how large its heads are

_computing_here: weakref.ReferenceType[LLMEngine] | None = None  # the engine that this process has


def start(path: str, settings: Generation, dtype: str, devices: EngineDevices, sleeps: bool) -> LLMEngine:
    """Start vLLM's engine in this process. Some settings are environment variables; those that the user set stay.

    Raises RuntimeError where another engine computes in this process: their groups and contexts are the process's.
    """
    global _computing_here  # noqa: PLW0603 - so is vLLM's own state
    if not devices.workers and _computing_here is not None and _computing_here() is not None:
        raise RuntimeError(
            "a process has one vLLM engine, and another run of this program has it: start this run when that one has "
            "ended, or give one of them runtime = 'ray' or generation.engine = 'torch'"
        )
    on_cpu = not torch.cuda.is_available()
    for name, value in {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if on_cpu else {})}.items():
        os.environ.setdefault(name, value)
    _give_cache()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no preference: loads between steps rely on it
    if on_cpu:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch, already loaded, reads the variable no more

    from vllm import EngineArgs, LLMEngine

    # kv_cache_memory_bytes says what is taken. On CUDA vLLM would want nine tenths of the device, which training has.
    context = engine_context(path, settings)
    limits: dict[str, Any] = {"gpu_memory_utilization": 0.01}
    if on_cpu:
        # A prompt cut into chunks takes back a seeded draw, which generators on the CPU can't: prompts run whole.
        whole = max(_CPU_BATCHED_TOKENS, context)
        limits = {"block_size": BLOCK_TOKENS, "enable_chunked_prefill": False, "max_num_batched_tokens": whole}
    if devices.workers:
        # Forked, they would inherit this process's threads and its part in the training ranks' groups.
        os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
        limits |= {"tensor_parallel_size": devices.workers, "distributed_executor_backend": "mp"}
    arguments = EngineArgs(
        model=path,
        max_model_len=context,
        dtype=dtype,  # type: ignore[arg-type]
        load_format="dummy",  # weights come by publication
        skip_tokenizer_init=True,
        generation_config="vllm",  # not the folder's sampling defaults
        max_num_seqs=settings.slots,
        kv_cache_memory_bytes=settings.kv_cache_bytes or _cache_bytes(path, settings, context, dtype, devices),
        enable_prefix_caching=True,
        # Of the distribution that is sampled from. It covers temperature, min_p, top_k, top_p and min_tokens in every
        # version: FlashInfer's sampler, which returns none of it, is not taken with this mode nor with seeds.
        logprobs_mode="processed_logprobs",
        enforce_eager=on_cpu,
        enable_sleep_mode=sleeps,
        async_scheduling=False,  # a step's tokens are out before the next: nothing is in flight at a load
        disable_log_stats=True,
        seed=0,
        **limits,
    )
    with seen_by_workers(devices.visible):
        engine = LLMEngine.from_engine_args(arguments)
    if not devices.workers:
        _computing_here = weakref.ref(engine)
    return engine


def _give_cache() -> None:
    """Let vLLM keep what it finds out about models in a temporary folder, where it can't in the user's own."""
    from vllm import envs

    try:
        Path(envs.VLLM_CACHE_ROOT).mkdir(parents=True, exist_ok=True)
        if os.access(envs.VLLM_CACHE_ROOT, os.W_OK | os.X_OK):
            return
    except OSError:
        pass
    os.environ["VLLM_CACHE_ROOT"] = folder = tempfile.mkdtemp(prefix="asyncflow-vllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _cache_bytes(path: str, settings: Generation, context: int, dtype: str, devices: EngineDevices) -> int:
    """Bytes of the KV cache of each worker: for `slots` rows, as far as a part of the device's memory goes.

    Raises ValueError, with the recipe's keys, where that does not hold one row.
    """
    sizes = attention_sizes(config_in(path))
    if sizes is None:
        return _FALLBACK_CACHE_BYTES
    shards = max(devices.workers, 1)
    wanted, one = (cache_bytes(sizes, rows, context, dtype, shards) for rows in (settings.slots, 1))
    limit = _memory_for_cache()
    if one > limit:
        raise ValueError(
            f"generation.max_model_tokens = {context}: the KV cache of one row takes {one >> 20} MiB, and this device "
            f"has {limit >> 20} MiB for it; want fewer tokens, or set generation.kv_cache_bytes to take more"
        )
    return min(wanted, limit)


def _memory_for_cache() -> int:
    """Bytes: of the free memory of a GPU, or of all memory of a machine that other services share."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free * _CUDA_SHARE)
    return int(host_memory() * _HOST_SHARE)


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(machine, int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return machine


@contextmanager
def seen_by_workers(devices: str) -> Iterator[None]:
    """Context in which started processes see these CUDA devices; this process has found its own already."""
    own = os.environ.get(_VISIBLE)
    if devices:
        os.environ[_VISIBLE] = devices
    try:
        yield
    finally:
        if devices and own is None:
            del os.environ[_VISIBLE]
        elif own is not None:
            os.environ[_VISIBLE] = own


def shut_down(engine: LLMEngine, owns_process_group: bool) -> None:
    """End the engine's workers and free its memory; torch.distributed too where it was vLLM that began it here."""
    global _computing_here  # noqa: PLW0603
    if _computing_here is not None and _computing_here() is engine:
        _computing_here = None
    client: Any = engine.engine_core
    if owns_process_group:
        from vllm.distributed import cleanup_dist_env_and_memory

        client.shutdown()
        cleanup_dist_env_and_memory()
        return
    # The core's own way would end torch.distributed for this whole process, which is a rank of a model that trains.
    if finalizer := getattr(client, "_finalizer", None):  # newer clients do it when they are collected, too
        finalizer.detach()
    core = client.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # the core froze what it allocated at its start: it would never be collected


def token_prompt(tokens: list[int]) -> Any:
    """A prompt that is already tokenized."""
    return {"type": "token", "prompt_token_ids": tokens}


def hide_tokens(worker: Any, tokens: list[int]) -> None:
    """Let the model never give these ids a probability, in what is sampled and in every log-prob.

    A parameter of each request would do it too, for a mask that is copied at each step, or for 1024 tokens at most.
    """
    if not tokens:
        return
    model = worker.model_runner.get_model()
    compute_logits, hidden = model.compute_logits, torch.tensor(tokens, device=worker.device)

    def known_only(*args: Any, **kwargs: Any) -> Tensor | None:
        logits = compute_logits(*args, **kwargs)
        return None if logits is None else logits.index_fill_(-1, hidden, -math.inf)  # one of several workers has them

    model.compute_logits = known_only


def begin_load(worker: Any) -> None:
    """Make every layer wait for its tensors: vLLM processes a layer's weights when all of them are there."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    model = worker.model_runner.get_model()
    if not torch.cuda.is_available():
        _forget_expert_kernels(model)
    with _configured(worker):
        initialize_layerwise_reload(model)


def _forget_expert_kernels(model: Any) -> None:
    """Have vLLM set up the kernels of experts anew: for one that is there, it leaves out the packing that CPUs need."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def load_tensors(worker: Any, named: Iterable[tuple[str, Tensor]]) -> None:
    with _configured(worker):
        worker.model_runner.get_model().load_weights(named)


def load_shared(worker: Any, part: SharedTensors) -> None:
    """Join the shards of each tensor; the loaders of a tensor-parallel worker keep the worker's part."""
    load_tensors(worker, part.on_device(worker.device))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the buffers have been read when this returns


def finish_load(worker: Any) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

    with _configured(worker):
        finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)


def _configured(worker: Any) -> AbstractContextManager[Any]:
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(worker.vllm_config)


def reprocess_head(worker: Any) -> None:
    """Process the output head's weight again.

    On the CPU its kernel reads a packed copy. A publication of tied weights has no tensor for the head, and vLLM's
    layerwise reload then leaves that copy as it was.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def zero_kv_cache(worker: Any) -> None:
    """Zero what refused weights computed: a NaN would outlive its block, as masked positions are multiplied by 0."""
    for tensor in worker.model_runner.kv_caches:
        tensor.zero_()
