"""The pretraining (ptx) loss: which text rows an optimizer step uses, and what they add to its gradient."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from protocols.data.messages import Experience
from tests import tiny
from tests.workers.batches import experience
from tests.workers.gradients import gradients_of
from workers.data.datasets import DataError
from workers.data.pretraining import PretrainingText
from workers.data.token_rows import TokenRows
from workers.finetune.sft import response_loss
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Loss, Model, Optimizer

PTX = 0.7
NO_CLIP = Optimizer(gradient_clip=0.0)

Write = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_policy(tmp_path_factory.mktemp("policy"), context=32))


def rows_of(count: int) -> Experience:
    """Experience whose tokens are inside the policy's vocabulary."""
    rows = experience(count)
    last = len(tiny.VOCABULARY) - 1
    prompts, responses = (c.with_values(np.minimum(c.values, last)) for c in (rows.prompts, rows.responses))
    return replace(rows, prompts=prompts, responses=responses)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows(*rows: dict[str, Any]) -> str:
        path = tmp_path / "pretrain.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return rows


def text_of(count: int, rows: int, seed: int = 3) -> PretrainingText:
    """Text rows whose first token is their number."""
    draw = np.random.default_rng(1)
    responses = [draw.integers(2, len(tiny.VOCABULARY), n) for n in draw.integers(1, 9, count)]
    return PretrainingText(TokenRows.of([[row] for row in range(count)], responses), rows, seed)


def worker(folder: str, loss: Loss, text: PretrainingText | None = None) -> PolicyWorker:
    return PolicyWorker(Model(path=folder, learning_rate=1e-3), loss, NO_CLIP, Generation(), 3, text)


# --- which rows a step uses


def test_every_row_is_drawn_once_in_each_epoch():
    text = text_of(10, rows=4)
    numbers = [int(row[0]) for step in range(5) for row in text.batch(step).prompts]
    first, second = numbers[:10], numbers[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_draw_depends_on_the_seed_and_the_steps_number_alone():
    again, other = text_of(10, rows=4), text_of(10, rows=4, seed=4)
    text = text_of(10, rows=4)
    list(map(text.row_indices, range(7)))
    assert text.row_indices(7).tolist() == again.row_indices(7).tolist() != other.row_indices(7).tolist()


def test_more_rows_than_there_are_are_several_epochs():
    assert np.bincount(text_of(3, rows=6).row_indices(4)).tolist() == [2, 2, 2]


def test_a_text_is_learned_from_its_second_token_and_a_response_from_its_first(folder: str, write: Write):
    path = write({"text": "abcd"}, {"prompt": "1+1=", "response": "2"})
    batch = PretrainingText.read(path, folder, rows=2, seed=0).batch(0)
    rows = {tuple(p.tolist()): r.tolist() for p, r in zip(batch.prompts, batch.responses, strict=True)}
    assert rows == {
        tuple(tiny.encode("a")): [*tiny.encode("bcd"), tiny.EOS_ID],
        tuple(tiny.encode("1+1=")): [*tiny.encode("2"), tiny.EOS_ID],
    }


def test_a_text_longer_than_the_context_is_several_rows(folder: str, write: Write):
    text = PretrainingText.read(write({"text": "a" * 70}), folder, rows=3, seed=0)
    assert len(text) == 3
    batch = text.batch(0)
    assert sorted(batch.prompts.lengths + batch.responses.lengths) == [7, 32, 32]


def test_rows_that_do_not_fit_are_all_reported_and_refused_or_left_out(folder: str, write: Write):
    path = write({"text": "good"}, {"prompt": "a" * 30, "response": "b" * 5}, {"prompt": "a", "response": "b" * 40})
    found = rf"2 of 3 rows: {path}:2 has 36 tokens, {path}:3 has 42 tokens: the model's context is 32 tokens"
    with pytest.raises(DataError, match=f"^{found}; want shorter rows, or data.overlong = 'skip'"):
        PretrainingText.read(path, folder, rows=1, seed=0)
    text = PretrainingText.read(path, folder, rows=1, seed=0, skip_overlong=True)
    assert (len(text), text.left_out) == (1, found)
    path = write({"prompt": "a" * 30, "response": "b" * 5})
    with pytest.raises(DataError, match="no text is left: 1 of 1 rows"):
        PretrainingText.read(path, folder, rows=1, seed=0, skip_overlong=True)


def test_a_file_of_empty_texts_is_refused(folder: str, write: Write):
    with pytest.raises(DataError, match=r"pretrain\.jsonl: all of its 2 texts are empty"):
        PretrainingText.read(write({"text": ""}, {"text": ""}), folder, rows=1, seed=0)


# --- what they add to the gradient


@pytest.mark.parametrize("budget", [10_000, 40])
def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients(folder: str, budget: int):
    """In float64, to 1e-6, for any micro-batches of the text and of the rows."""
    text, rows = text_of(10, rows=6), rows_of(6)

    def policy(loss: Loss, text: PretrainingText | None = None) -> PolicyWorker:
        made = worker(folder, loss, text)
        made.model.module.double()
        return made

    both = policy(Loss(ptx_coefficient=PTX, tokens_per_micro_batch=budget), text)
    together = gradients_of(both.model.module, lambda: both.update(rows))
    alone = policy(Loss())
    reinforced = gradients_of(alone.model.module, lambda: alone.update(rows))
    model, batch = policy(Loss()).model, text.batch(0)
    pretrained = gradients_of(model.module, lambda: model.backward(batch, 10_000, response_loss(batch)))
    for name, gradient in together.items():
        expected = reinforced[name] + PTX * pretrained[name]
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


def test_the_step_tells_the_cross_entropy_and_its_loss_has_it(folder: str):
    text, rows = text_of(10, rows=6), rows_of(6)
    both, alone = worker(folder, Loss(ptx_coefficient=PTX), text), worker(folder, Loss())
    (expected,) = alone.model.forward(text.batch(0), 10_000, response_loss(text.batch(0)))
    measured, plain = both.update(rows).values, alone.update(rows).values
    assert measured["ptx_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert measured["loss"] == pytest.approx(plain["loss"] + PTX * expected.item(), rel=1e-5)
    assert "ptx_loss" not in plain


def test_each_optimizer_step_has_rows_of_its_own(folder: str, monkeypatch: pytest.MonkeyPatch):
    text, steps = text_of(10, rows=6), []
    original = text.batch
    spied = worker(folder, Loss(ptx_coefficient=PTX, epochs=2, mini_batches=2), text)
    monkeypatch.setattr(PretrainingText, "batch", lambda _, step: steps.append(step) or original(step))
    for _ in range(2):
        spied.update(rows_of(6))
    assert steps == list(range(8))


def test_a_resumed_policy_draws_on_bit_for_bit(folder: str, tmp_path: Path):
    loss, rows = Loss(ptx_coefficient=PTX, mini_batches=2), rows_of(6)
    whole = worker(folder, loss, text_of(10, rows=6))
    whole.update(rows)
    whole.save(str(tmp_path))
    whole.update(rows)
    resumed = worker(folder, loss, text_of(10, rows=6))
    resumed.load(str(tmp_path))
    resumed.update(rows)
    pairs = itertools.zip_longest(whole.model.module.parameters(), resumed.model.module.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_coefficient_without_text_is_refused(folder: str):
    with pytest.raises(ValueError, match=r"ptx_coefficient = 0.7 needs pretraining text"):
        worker(folder, Loss(ptx_coefficient=PTX))
