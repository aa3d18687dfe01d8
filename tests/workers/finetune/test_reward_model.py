"""A reward model learns to score the better of two responses higher, ends included."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny
from workers.data.datasets import DataError, Preference
from workers.finetune.reward_model import Pairs, pair_accuracy, pair_loss, train_reward_model
from workers.finetune.settings import RewardModelSettings, Schedule
from workers.training.models import load_reward, load_untrained_reward

# The right answer is the digit asked for; wrong ones are another digit, two of them, or the right one without its end.
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


def test_pair_accuracy_rises_and_the_output_scores_as_it_was_evaluated(base: Path, tmp_path: Path):
    data = write(tmp_path / "pairs.jsonl", PAIRS[::2])
    heldout = write(tmp_path / "heldout.jsonl", PAIRS[1::2])
    schedule = Schedule(60, batch_size=32, learning_rate=2e-3)
    settings = RewardModelSettings(str(base), str(data), str(heldout), str(tmp_path / "reward"), schedule)
    steps: list[int] = []
    result = train_reward_model(settings, on_step=lambda step, _: steps.append(step))
    assert steps == list(range(60))
    assert result.losses[0] == pytest.approx(math.log(2), abs=0.3)
    assert result.heldout_accuracy > 0.8
    saved = pair_accuracy(load_reward(result.output), Pairs.tokenized(tiny.tokenizer(), PAIRS[1::2]), 8192)
    assert saved == result.heldout_accuracy


def test_training_goes_on_from_a_reward_model(tmp_path: Path):
    folder = tiny.make_reward(tmp_path / "reward")
    assert torch.equal(head(load_untrained_reward(str(folder), "float32", 3)), head(load_reward(folder)))


def test_the_fresh_head_comes_from_the_seed_alone(base: Path):
    heads = []
    for state, seed in ((1, 3), (2, 3), (3, 4)):
        torch.manual_seed(state)
        heads.append(head(load_untrained_reward(str(base), "float32", seed)))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@torch.no_grad()
def test_the_loss_is_bradley_terry_with_centred_scores(tmp_path: Path):
    model = load_reward(tiny.make_reward(tmp_path / "reward"))
    rows = [Preference("1*", "1", "234"), Preference("77*", "7", "7", rejected_truncated=True)]

    def score(text: str) -> float:
        ids = torch.tensor([tiny.tokenizer().encode(text)])
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
        return float(head(model)[0] @ hidden)

    chosen, rejected = [score("1*1<eos>"), score("77*7<eos>")], [score("1*234<eos>"), score("77*7")]
    want = np.mean([math.log1p(math.exp(r - c)) + 0.1 * (c + r) ** 2 for c, r in zip(chosen, rejected, strict=True)])
    pairs = Pairs.tokenized(tiny.tokenizer(), rows)
    for budget in (8192, 1):  # all at once, and a pair at a time
        parts = list(pair_loss(model, pairs, budget, centring=0.1))
        assert len(parts) == (1 if budget > 1 else 2)
        assert float(sum(parts)) == pytest.approx(want, abs=1e-5)
    assert pair_accuracy(model, pairs, 8192) == np.mean([c > r for c, r in zip(chosen, rejected, strict=True)])


def test_a_tie_counts_half(tmp_path: Path):
    model = load_reward(tiny.make_reward(tmp_path / "reward"))
    assert pair_accuracy(model, Pairs.tokenized(tiny.tokenizer(), [Preference("1*", "1", "1")]), 8192) == 0.5


def test_a_pair_stays_together_in_every_cut():
    pairs = Pairs.tokenized(tiny.tokenizer(), PAIRS)
    for batch in pairs.micro_batches(60):
        chosen, rejected = np.split(batch.rows, 2)
        assert np.array_equal(chosen + len(pairs), rejected)
        assert len(batch.rows) == 2 or batch.tokens.numel() <= 60


def test_bad_heldout_pairs_are_refused_before_training(base: Path, tmp_path: Path):
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "p", "chosen": "c"}')
    settings = RewardModelSettings(
        "no model", str(data), str(tmp_path / "heldout.jsonl"), str(tmp_path / "out"), Schedule(1)
    )
    with pytest.raises(DataError, match=r"heldout\.jsonl:1: no field 'rejected'"):
        train_reward_model(settings)
