"""Fused attention computes what eager attention does, padding included; families without it stay eager."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests import tiny
from tests.workers.training.test_outputs import SMALL
from workers.data.token_rows import TokenRows
from workers.parallel.backends import trained_model
from workers.parallel.model import ParallelModel
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Attention, Model
from workers.training.models import load_causal, response_log_probs

LENGTHS = ([3, 9, 1], [12, 2, 5])  # of prompts and responses: in one micro-batch with much padding


def rows() -> TokenRows:
    draw = np.random.default_rng(1)
    return TokenRows.of(*([draw.integers(2, 40, n) for n in lengths] for lengths in LENGTHS))


def step(folder: Path, attention: Attention) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Log-probs, and the gradients of their mean."""
    model = trained_model(Model(path=str(folder), attention=attention), ONE_DEVICE)
    assert model.config._attn_implementation == attention
    log_probs = model.outputs(rows(), 1000, response_log_probs)
    assert log_probs is not None
    model.backward(rows(), 1000, lambda outputs, micro: response_log_probs(outputs, micro).mean())
    return log_probs, {name: p.grad for name, p in model.optimized.items() if p.grad is not None}


@pytest.mark.parametrize("make", [tiny.make_policy, tiny.make_gpt2])
def test_sdpa_is_eager_to_rounding(tmp_path: Path, make):
    folder = make(tmp_path)
    fused, eager = step(folder, "sdpa"), step(folder, "eager")
    np.testing.assert_allclose(fused[0], eager[0], atol=1e-5)
    for name, gradient in eager[1].items():
        torch.testing.assert_close(fused[1][name], gradient, rtol=0, atol=1e-5)


def test_the_same_step_has_the_same_bits(tmp_path: Path):
    folder = tiny.make_policy(tmp_path)
    first, second = step(folder, "sdpa"), step(folder, "sdpa")
    assert np.array_equal(first[0], second[0])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())


@torch.no_grad()
def test_queries_that_may_look_nowhere_give_no_nan(tmp_path: Path):
    """An engine pads on the left: there a padding token's query is masked from all keys."""
    model = load_causal(tiny.make_policy(tmp_path))
    tokens = torch.tensor([[0, 0, 0, 5, 6, 7]])
    padded = model(
        input_ids=tokens, attention_mask=(tokens > 0).long(), position_ids=torch.tensor([[0, 0, 0, 0, 1, 2]])
    )
    alone = model(input_ids=tokens[:, 3:])
    assert padded.logits.isfinite().all()
    torch.testing.assert_close(padded.logits[:, 3:], alone.logits, rtol=0, atol=1e-5)


def test_a_soft_cap_on_attention_stays_eager_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """sdpa would leave the cap out."""
    folder = tiny.save_random(Gemma2ForCausalLM, Gemma2Config(**SMALL, attn_logit_softcapping=50.0), tmp_path, 0)
    model: ParallelModel = trained_model(Model(path=str(folder)), ONE_DEVICE)
    assert model.config._attn_implementation == "eager"
    assert "attention is eager" in caplog.text


def test_flash_attention_of_a_family_without_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tiny.make_policy(tmp_path)
    monkeypatch.setattr(type(load_causal(folder)), "_supports_flash_attn", False)
    with pytest.raises(ValueError, match="want 'sdpa' or 'eager'"):
        load_causal(folder, attention="flash_attention_2")
