"""The head in chunks gives the log-probs, entropies and gradients of all logits at once, and never holds them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from protocols.roles import Sampling
from tests import tiny
from workers.data.token_rows import TokenRows
from workers.losses.regularizers import token_entropies
from workers.parallel.backends import trained_model
from workers.parallel.model import ParallelModel
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Lora, Model
from workers.training.micro_batches import MicroBatch
from workers.training.outputs import Outputs
from workers.training.token_distribution import TokenDistribution
from workers.training.token_head import TokenHead

VOCABULARY = 96
HIDDEN = 128  # of `tiny.make_policy`; [HIDDEN, VOCABULARY] is the head's weight, transposed
CHUNK = 3  # 17 response tokens are six chunks
SAMPLINGS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.7),
    "truncated": Sampling(temperature=1.3, top_p=0.9, top_k=20, min_p=0.01),
}
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.1, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
ODD_HEADS = {
    "a soft cap": (Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
    "a factor": (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
    "a divisor": (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0)),
    "a projection": (
        OPTForCausalLM,
        OPTConfig(vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
                  num_attention_heads=4, init_std=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=1),
    ),
}  # fmt: skip


def rows() -> TokenRows:
    draw = np.random.default_rng(7)
    prompts, responses = [3, 5, 2, 4], [6, 1, 0, 10]
    return TokenRows.of(*([draw.integers(2, VOCABULARY, n) for n in lengths] for lengths in (prompts, responses)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """By whether the head is tied to the embedding."""
    root = tmp_path_factory.mktemp("policies")
    return {tied: str(tiny.make_policy(root / str(tied), tied=tied, vocabulary=VOCABULARY)) for tied in (True, False)}


def measured(model: ParallelModel, distribution: TokenDistribution) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Log-probs and entropies [2, T], and the loss and gradients of a loss of both."""
    seen: list[Tensor] = []

    def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
        log_probs, entropies = outputs.of_responses(
            micro, lambda *logits: (distribution.log_probs(*logits), entropies_of(distribution, *logits))
        )
        seen.append(torch.stack([log_probs, entropies]).detach())
        weights = torch.linspace(-1.0, 1.0, len(log_probs))
        return (weights * log_probs - 0.1 * entropies).mean()

    total = model.backward(rows(), 1000, loss)
    return seen[0], total, {name: p.grad for name, p in model.optimized.items() if p.grad is not None}


def entropies_of(distribution: TokenDistribution, logits: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    return token_entropies(distribution.processed(logits, places))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [Lora(), Lora(rank=2)], ids=["all", "lora"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_chunks_give_what_the_whole_gives(folders: dict[bool, str], sampling: str, lora: Lora, tied: bool):
    distribution = TokenDistribution(SAMPLINGS[sampling])
    whole, by_chunk = (
        measured(trained_model(Model(path=folders[tied], lora=lora, head_chunk=chunk), ONE_DEVICE), distribution)
        for chunk in (0, CHUNK)
    )
    torch.testing.assert_close(by_chunk[0], whole[0], rtol=1e-6, atol=1e-6)
    assert by_chunk[1] == pytest.approx(whole[1], abs=1e-6)
    assert by_chunk[2].keys() == whole[2].keys()
    assert any(float(gradient.abs().max()) > 0.01 for gradient in whole[2].values())
    for name, gradient in whole[2].items():
        assert float((by_chunk[2][name] - gradient).abs().max()) < 1e-6, name


def test_gradients_of_a_head_in_bfloat16_are_rounded_once(folders: dict[bool, str]):
    """One product over all tokens rounds its sum once; sums of rounded chunks would be off by more."""
    found = {}
    for chunk in (0, 1):
        model = trained_model(Model(path=folders[False], dtype="bfloat16", head_chunk=chunk), ONE_DEVICE)
        found[chunk] = measured(model, TokenDistribution(Sampling()))[2]["lm_head.weight"]
    difference = (found[1] - found[0]).norm() / found[0].norm()
    assert difference < 2.0**-8


@pytest.mark.parametrize("grad", [True, False], ids=["training", "answering"])
def test_the_logits_of_more_tokens_than_a_chunk_never_exist(folders: dict[bool, str], grad: bool):
    model = trained_model(Model(path=folders[True], head_chunk=CHUNK), ONE_DEVICE)
    distribution = TokenDistribution(SAMPLINGS["truncated"])
    with largest_logits() as found:
        if grad:
            measured(model, distribution)
        else:
            model.outputs(rows(), 1000, distribution.of_responses)
    assert found == [CHUNK]


@contextmanager
def largest_logits() -> Iterator[list[int]]:
    """The most tokens that any tensor computed in this context has logits of, or their gradients, in a list."""
    found: list[int] = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, list | tuple) else [out]:
                shape = tensor.shape if isinstance(tensor, Tensor) else ()
                if len(shape) > 1 and shape[-1] == VOCABULARY and shape[0] != HIDDEN:
                    found[0] = max(found[0], math.prod(shape[:-1]))
            return out

    with Watch():
        yield found


# --- what a family does to its logits


@pytest.mark.parametrize("name", ODD_HEADS)
@torch.no_grad()
def test_a_familys_own_logits_are_kept(tmp_path: Path, name: str):
    kind, shape = ODD_HEADS[name]
    folder = tiny.save_random(kind, shape, tmp_path, 0)
    model = trained_model(Model(path=str(folder), head_chunk=CHUNK), ONE_DEVICE)
    assert TokenHead.find(model.module) is not None
    got = model.outputs(rows(), 1000, TokenDistribution(Sampling()).of_responses)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    expected = [
        tiny.log_probs(alone, prompt, response)
        for prompt, response in zip(rows().prompts, rows().responses, strict=True)
        if len(response)
    ]
    assert got is not None
    np.testing.assert_allclose(got, np.concatenate(expected), atol=1e-5)


def test_a_head_that_can_not_be_used_by_itself_computes_all_logits(
    folders: dict[bool, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Here a family whose logits depend on other positions; the log says so once."""
    kind = type(trained_model(Model(path=folders[True]), ONE_DEVICE).module)
    plain: Any = kind.forward

    def forward(self: PreTrainedModel, *inputs: Any, **options: Any) -> Any:
        outputs = plain(self, *inputs, **options)
        outputs.logits = outputs.logits * (1.0 if options.get("input_ids") is None else 2.0)
        return outputs

    monkeypatch.setattr(kind, "forward", forward)
    model = trained_model(Model(path=folders[True], head_chunk=CHUNK), ONE_DEVICE)
    assert "its head can't be used by itself" in caplog.text
    got = model.outputs(rows(), 1000, TokenDistribution(Sampling()).of_responses)
    expected = np.concatenate([
        tiny.log_probs(model.module, prompt, response)
        for prompt, response in zip(rows().prompts, rows().responses, strict=True)
        if len(response)
    ])  # fmt: skip
    assert got is not None
    np.testing.assert_allclose(got, expected, atol=1e-5)
