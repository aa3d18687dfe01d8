"""A reward model learns to score the better of two responses higher; the end token counts."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests import tiny
from workers.data.datasets import DataError, Preference
from workers.data.tokenizer import Tokenizer
from workers.finetune.reward_model import (
    PAIR,
    heldout_accuracy_of,
    pair_accuracy,
    pair_loss,
    pair_scores,
    tokenized_pairs,
    train_reward_model,
)
from workers.finetune.settings import RewardModelSettings, Schedule
from workers.parallel.backends import trained_model
from workers.parallel.model import ParallelModel
from workers.parallel.sharding import ONE_DEVICE
from workers.settings import Lora, Model
from workers.training.micro_batches import micro_batches
from workers.training.models import load_reward

# The right answer is the digit in the prompt. Wrong ones are another digit, two digits, or the right one without end.
PAIRS = [
    Preference(f"{a}*", str(a), wrong, rejected_truncated=cut)
    for a in range(10)
    for wrong, cut in [(str((a + b) % 10), False) for b in range(1, 10)] + [(f"{a}{a}", False), (str(a), True)]
]


def write(path: Path, pairs: list[Preference]) -> Path:
    path.write_bytes(msgspec.json.Encoder().encode_lines(pairs))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("base"))


def head(model: PreTrainedModel) -> torch.Tensor:
    return model.get_parameter("score.weight").detach()


def model_at(folder: str | Path) -> ParallelModel:
    return trained_model(Model(path=str(folder)), ONE_DEVICE, head="score")


def accuracy_of(folder: str | Path, rows: list[Preference]) -> float:
    return pair_accuracy(pair_scores(model_at(folder), tokenized_pairs(Tokenizer(folder), rows, "rows"), 8192))


def test_pair_accuracy_rises_and_the_output_scores_as_it_was_evaluated(base: Path, tmp_path: Path):
    data = write(tmp_path / "pairs.jsonl", PAIRS[::2])
    heldout = write(tmp_path / "heldout.jsonl", PAIRS[1::2])
    schedule = Schedule(60, batch_size=32, learning_rate=2e-3)
    settings = RewardModelSettings(str(base), str(data), str(tmp_path / "reward"), schedule, heldout=str(heldout))
    steps: list[int] = []
    result = train_reward_model(settings, on_step=lambda step, _: steps.append(step))
    assert steps == list(range(60))
    assert result.losses[0] == pytest.approx(math.log(2), abs=0.3)
    assert result.heldout_accuracy is not None and result.heldout_accuracy > 0.8
    assert accuracy_of(result.output, PAIRS[1::2]) == result.heldout_accuracy


def test_adapters_and_a_new_score_head_train_without_held_out_pairs(base: Path, tmp_path: Path):
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    schedule = Schedule(40, batch_size=32, learning_rate=5e-3)
    settings = RewardModelSettings(str(base), str(data), str(tmp_path / "reward"), schedule, lora=Lora(rank=4))
    result = train_reward_model(settings)
    assert result.heldout_accuracy is None and heldout_accuracy_of(result.output) is None
    assert accuracy_of(result.output, PAIRS) > 0.7
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "reward" / "model.safetensors")
    changed = {name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    assert changed and all("_proj." in name for name in changed)
    fresh = head(trained_model(Model(path=str(base)), ONE_DEVICE, head="score", seed=0).module)
    assert not torch.equal(after["score.weight"], fresh), "the head trains as well"
    assert (tmp_path / "reward" / "adapters").is_dir()


def test_training_goes_on_from_a_reward_model(tmp_path: Path):
    folder = tiny.make_reward(tmp_path / "reward")
    assert torch.equal(head(load_reward(folder, seed=3)), head(load_reward(folder)))


def test_the_fresh_head_comes_from_the_seed_alone(base: Path):
    heads = []
    for state, seed in ((1, 3), (2, 3), (3, 4)):
        torch.manual_seed(state)
        heads.append(head(load_reward(base, seed=seed)))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@torch.no_grad()
def test_the_loss_is_bradley_terry_with_centred_scores(tmp_path: Path):
    folder = tiny.make_reward(tmp_path / "reward")
    model = load_reward(folder)
    rows = [Preference("1*", "1", "234"), Preference("77*", "7", "7", rejected_truncated=True)]

    def score(text: str) -> float:
        ids = torch.tensor([tiny.tokenizer().encode(text)])
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
        return float(head(model)[0] @ hidden)

    chosen, rejected = [score("1*1<eos>"), score("77*7<eos>")], [score("1*234<eos>"), score("77*7")]
    want = np.mean([math.log1p(math.exp(r - c)) + 0.1 * (c + r) ** 2 for c, r in zip(chosen, rejected, strict=True)])
    pairs, loss, whole = tokenized_pairs(Tokenizer(folder), rows, "rows"), pair_loss(2, centring=0.1), model_at(folder)
    for budget in (8192, 1):  # all at once, and a pair at a time
        with torch.enable_grad():
            assert whole.backward(pairs, budget, loss, PAIR) == pytest.approx(want, abs=1e-5)
    assert accuracy_of(folder, rows) == np.mean([c > r for c, r in zip(chosen, rejected, strict=True)])


def test_a_tie_counts_half(tmp_path: Path):
    assert accuracy_of(tiny.make_reward(tmp_path / "reward"), [Preference("1*", "1", "1")]) == 0.5


def test_a_pair_stays_together_in_every_cut(base: Path):
    for batch in micro_batches(tokenized_pairs(Tokenizer(base), PAIRS, "rows"), 60, together=PAIR):
        chosen, rejected = batch.rows.reshape(-1, PAIR).T
        assert np.array_equal(chosen + 1, rejected)
        assert not (chosen % PAIR).any()
        assert len(batch.rows) == PAIR or batch.tokens.numel() <= 60


def test_bad_heldout_pairs_are_refused_before_training(base: Path, tmp_path: Path):
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "p", "chosen": "c"}')
    settings = RewardModelSettings(
        "no model", str(data), str(tmp_path / "out"), Schedule(1), heldout=str(tmp_path / "heldout.jsonl")
    )
    with pytest.raises(DataError, match=r"heldout\.jsonl:1: no field 'rejected'"):
        train_reward_model(settings)
