"""A trainable model takes complete steps only, and returns to any saved step bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from protocols.data.jagged import Jagged
from protocols.data.messages import LogProbs
from protocols.stage import StepAbandoned
from tests import tiny
from tests.workers.checkpoints import contents
from workers.data.token_rows import TokenRows
from workers.parallel.backends import trained_model
from workers.parallel.model import MicroLoss
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Loss, Model, Optimizer
from workers.training.micro_batches import MicroBatch
from workers.training.mini_batches import mini_batches, named_rows
from workers.training.models import response_log_probs
from workers.training.optimizer_step import LrSchedule, StepRefused
from workers.training.outputs import Outputs
from workers.training.trainable import TrainableModel

RATE = 1e-3
SETTINGS = Optimizer(warmup_steps=3, weight_decay=0.01)
TEXT = tiny.encode("12+34=46")
TOKENS = torch.from_numpy(TEXT.astype(np.int64))[None]
ROW = TokenRows.of([TEXT[:1]], [TEXT[1:]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"))


def trained(folder: Path, settings: Optimizer = SETTINGS) -> TrainableModel:
    return TrainableModel(trained_model(Model(path=str(folder)), ONE_DEVICE), str(folder), RATE, settings)


def cross_entropy(scale: float = 1.0) -> MicroLoss:
    """A loss whose gradient follows from the weights and `scale`."""
    return lambda outputs, micro: -scale * response_log_probs(outputs, micro).mean()


def infinite_gradient(outputs: Outputs, micro: MicroBatch) -> Tensor:
    """A finite loss with an infinite gradient."""
    loss = cross_entropy()(outputs, micro)
    return loss + (loss - loss.detach()).sqrt()


def step(model: TrainableModel, loss: MicroLoss, what: str = "a test") -> float:
    return model.step(what, ROW, 100, loss)["gradient_norm"]


def take_steps(model: TrainableModel, count: int, optimizer_steps: int = 1) -> None:
    for _ in range(count):
        with model.update(optimizer_steps):
            for _ in range(optimizer_steps):
                step(model, cross_entropy(1.0 + model.version))


def saved(model: TrainableModel, folder: Path) -> dict[str, bytes]:
    """The contents of a checkpoint, by file."""
    folder.mkdir()
    model.save(str(folder))
    return contents(folder)


# --- one step


def test_the_first_step_is_adamw_by_hand_on_the_clipped_gradient_at_the_warm_rate(folder: Path):
    settings = Optimizer(gradient_clip=0.5, warmup_steps=4, weight_decay=0.1, epsilon=1e-3)
    model = trained(folder, settings)
    named = dict(model.model.module.named_parameters())
    before = {n: p.detach().clone() for n, p in named.items()}
    gradients: dict[str, Tensor] = {}
    for name, parameter in named.items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    with model.update(1):
        norm = step(model, cross_entropy())
    assert norm == pytest.approx(float(torch.stack([g.norm() for g in gradients.values()]).norm()), rel=1e-5)
    assert norm > 0.5
    rate = RATE / 4
    for name, parameter in named.items():
        g = gradients[name] * 0.5 / norm
        want = before[name] * (1 - rate * 0.1) - rate * g / (g.abs() + 1e-3)  # both moments are bias corrected
        torch.testing.assert_close(parameter.detach(), want, atol=1e-6, rtol=0)


def test_without_a_clip_the_gradient_stays_as_it_is(folder: Path):
    ends = []
    for clip in (0.0, 1e6):
        model = trained(folder, Optimizer(gradient_clip=clip))
        take_steps(model, 2)
        ends.append(model.model.parameters["model.norm.weight"])
    assert torch.equal(*ends)


def test_a_step_is_a_version_and_ends_in_eval_mode_without_gradients(folder: Path):
    model = trained(folder)
    take_steps(model, 1)
    assert model.version == 1
    assert not model.model.module.training
    assert all(p.grad is None for p in model.model.module.parameters())


@pytest.mark.parametrize("optimizer_steps", [1, 3])
def test_an_abandoned_step_leaves_nothing_behind(folder: Path, tmp_path: Path, optimizer_steps: int):
    model = trained(folder)
    take_steps(model, 2)
    before = saved(model, tmp_path / "before")
    with pytest.raises(StepAbandoned), model.update(optimizer_steps):
        for _ in range(optimizer_steps - 1):
            step(model, cross_entropy(), "one of them")
        model.abandon()  # as another thread does meanwhile
        step(model, cross_entropy(), "the last of them")
    assert saved(model, tmp_path / "after") == before
    with pytest.raises(StepAbandoned):
        take_steps(model, 1)


@pytest.mark.parametrize("optimizer_steps", [1, 3])
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_step_that_fails_leaves_nothing_behind(folder: Path, tmp_path: Path, optimizer_steps: int, earlier: int):
    model = trained(folder)
    take_steps(model, earlier)
    before = saved(model, tmp_path / "before")
    with (
        pytest.raises(StepRefused, match=r"the last of them: gradient norm is (nan|inf)"),
        model.update(optimizer_steps),
    ):
        for _ in range(optimizer_steps - 1):
            step(model, cross_entropy(), "one of them")
        step(model, infinite_gradient, "the last of them")
    assert saved(model, tmp_path / "after") == before
    assert (model.version, model.model.module.training) == (earlier, False)
    assert all(p.grad is None for p in model.model.module.parameters())

    never_failed = trained(folder)
    take_steps(never_failed, earlier + 1)
    take_steps(model, 1)
    assert saved(model, tmp_path / "next") == saved(never_failed, tmp_path / "never")


def test_a_trained_model_needs_a_learning_rate(folder: Path):
    with pytest.raises(ValueError, match="needs a learning_rate above 0, got 0"):
        TrainableModel(trained_model(Model(path=str(folder)), ONE_DEVICE), str(folder), 0.0, SETTINGS)


# --- checkpoints


@pytest.mark.parametrize("optimizer_steps", [1, 2])
def test_going_on_after_a_load_is_never_having_stopped(folder: Path, tmp_path: Path, optimizer_steps: int):
    model = trained(folder)
    take_steps(model, 2, optimizer_steps)
    saved(model, tmp_path / "stop")
    take_steps(model, 2, optimizer_steps)  # the learning rate still warms up, so its schedule is restored as well
    loaded = trained(folder)
    loaded.load(str(tmp_path / "stop"))
    assert loaded.version == 2
    take_steps(loaded, 2, optimizer_steps)
    assert saved(loaded, tmp_path / "loaded") == saved(model, tmp_path / "never stopped")


def test_going_back_to_the_start_forgets_the_moments(folder: Path, tmp_path: Path):
    model = trained(folder)
    start = saved(model, tmp_path / "start")
    take_steps(model, 2)
    model.load(str(tmp_path / "start"))
    assert saved(model, tmp_path / "again") == start


def test_parameters_that_the_loss_does_not_reach_go_on_alike(folder: Path, tmp_path: Path):
    model = trained(folder)
    norm = model.model.parameters["model.norm.weight"]
    with model.update(1):
        step(model, lambda outputs, micro: norm.sum(), "a step of one parameter")
    saved(model, tmp_path / "stop")
    loaded = trained(folder)
    loaded.load(str(tmp_path / "stop"))
    for each in (model, loaded):
        take_steps(each, 2)
    assert saved(loaded, tmp_path / "loaded") == saved(model, tmp_path / "never stopped")


@pytest.mark.parametrize(
    ("layers", "kv_heads", "says"),
    [(1, 2, r"tensors differ from the model's: .*layers\.1"), (2, 4, r"k_proj\.\w+ has shape")],
)
def test_another_models_folder_is_refused_and_changes_nothing(
    folder: Path, tmp_path: Path, layers: int, kv_heads: int, says: str
):
    other = trained(tiny.make_policy(tmp_path / "other", layers=layers, kv_heads=kv_heads))
    take_steps(other, 1)
    saved(other, tmp_path / "others")
    model = trained(folder)
    before = saved(model, tmp_path / "before")
    with pytest.raises(ValueError, match=says):
        model.load(str(tmp_path / "others"))
    assert saved(model, tmp_path / "after") == before


def test_a_checkpoint_holds_a_tied_tensor_once(folder: Path, tmp_path: Path):
    model = trained(folder)
    take_steps(model, 1)
    saved(model, tmp_path / "stop")
    (path,) = (tmp_path / "stop").glob("*.safetensors")
    tensors = load_file(path)
    weights = {name for name in tensors if not name.startswith("exp_avg")}
    assert "lm_head.weight" not in weights
    assert tensors.keys() == weights | {f"{moment}.{n}" for n in weights for moment in ("exp_avg", "exp_avg_sq")}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_the_model_and_its_tokenizer(tmp_path: Path, tied: bool):
    model = trained(tiny.make_policy(tmp_path / "policy", tied=tied))
    with torch.enable_grad():
        take_steps(model, 1)
    model.export(str(tmp_path / "out"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    assert torch.equal(exported(TOKENS).logits, model.model.module(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(TOKENS[0]) == "12+34=46"
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied


# --- mini-batches


def mini_batch_ids(batch: LogProbs, loss: Loss, seed: int = 0) -> Iterator[list[int]]:
    return (part.sample_ids.tolist() for part in mini_batches(batch, loss, seed))


def batch_of(rows: int) -> LogProbs:
    ids = np.arange(100, 100 + rows, dtype=np.int64)
    return LogProbs(sample_ids=ids, log_probs=Jagged.from_rows([[float(i)] for i in ids], np.float32))


def test_one_mini_batch_is_the_batch_in_its_order_every_epoch():
    batch = batch_of(5)
    assert all(part is batch for part in mini_batches(batch, Loss(epochs=2), seed=1))
    assert len(list(mini_batches(batch, Loss(epochs=2), seed=1))) == 2


def test_several_hold_every_row_once_an_epoch_and_each_epoch_draws_its_own_order():
    parts = list(mini_batch_ids(batch_of(7), Loss(epochs=2, mini_batches=3)))
    assert [len(part) for part in parts] == [3, 2, 2, 3, 2, 2]
    epochs = [list(chain(*parts[:3])), list(chain(*parts[3:]))]
    assert all(sorted(epoch) == list(range(100, 107)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_order_follows_from_the_seed():
    loss = Loss(mini_batches=3)
    assert list(mini_batch_ids(batch_of(7), loss, 4)) == list(mini_batch_ids(batch_of(7), loss, 4))
    assert list(mini_batch_ids(batch_of(7), loss, 4)) != list(mini_batch_ids(batch_of(7), loss, 5))


def test_more_mini_batches_than_rows_are_as_many_as_there_are_rows():
    assert [len(part) for part in mini_batch_ids(batch_of(2), Loss(mini_batches=5))] == [1, 1]


def test_an_error_names_a_few_rows_and_counts_them_all():
    assert named_rows(batch_of(2)) == "batch of 2 samples (100, 101)"
    assert named_rows(batch_of(9)) == "batch of 9 samples (100, 101, 102, 103, ...)"


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero_over_the_decay() -> None:
    schedule = LrSchedule.of(Optimizer(warmup_steps=4, decay_steps=10))
    factors = [schedule.factor(update) for update in range(1, 13)]
    assert factors[:4] == pytest.approx([0.25 * 1.0, 0.5 * 0.9, 0.75 * 0.8, 1.0 * 0.7])
    assert factors[9:] == pytest.approx([0.1, 0.0, 0.0])
    assert [LrSchedule.of(Optimizer()).factor(update) for update in (1, 1000)] == [1.0, 1.0]
    falling = LrSchedule.of(Optimizer(decay_steps=10, decay="cosine", floor=0.2))
    assert [falling.factor(update) for update in (1, 6, 11, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
