"""A model that leaves its device takes everything along and goes on, when it is back, as if it had stayed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from protocols.topology import Topology
from tests import tiny
from tests.workers.batches import VOCABULARY, experience
from workers.parallel_policy import ParallelPolicy
from workers.residence import HOST, Residence
from workers.settings import Generation, Loss, Model, Optimizer

DEVICE = torch.device("cuda", 0)  # never touched: copies are told where they are to be


class Journal:
    """Copies that note where they were sent; there is no second device here."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.sent.append(device.type)
        return tensor.clone()


def trained() -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Linear, optimizer: torch.optim.AdamW) -> None:
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tensors_of(model: nn.Linear, optimizer: torch.optim.AdamW) -> list[Tensor]:
    moments = [state[moment] for state in optimizer.state.values() for moment in ("exp_avg", "exp_avg_sq")]
    return [*model.parameters(), *moments]


def test_training_goes_on_as_if_the_model_had_stayed():
    stayed, moved = trained(), trained()
    residence = Residence(DEVICE, lambda: tensors_of(*moved), moves=True, copy=Journal().copy)
    for _ in range(3):
        step(*stayed)
        residence.come_back()
        step(*moved)
        residence.leave()
    for ours, theirs in zip(tensors_of(*moved), tensors_of(*stayed), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_and_the_moments_of_the_first_step_move_to_the_host_and_back():
    journal, (model, optimizer) = Journal(), trained()
    residence = Residence(DEVICE, lambda: tensors_of(model, optimizer), moves=True, copy=journal.copy)
    weights = 4 * (2 * 3 + 2)
    assert residence.leave() == weights, "no moments yet"
    assert residence.come_back() == weights
    step(model, optimizer)
    before = [tensor.data_ptr() for tensor in tensors_of(model, optimizer)]
    assert residence.leave() == 3 * weights
    assert journal.sent == ["cpu"] * 2 + ["cuda"] * 2 + ["cpu"] * 6
    assert not {*before} & {tensor.data_ptr() for tensor in tensors_of(model, optimizer)}, "another storage"


def test_a_parallel_policy_takes_its_weights_and_moments_along(tmp_path: Path):
    config = tiny.config()
    config.vocab_size = VOCABULARY
    Qwen2ForCausalLM(config).save_pretrained(str(tmp_path))

    def policy() -> ParallelPolicy:
        model = Model(path=str(tmp_path), learning_rate=0.1)
        return ParallelPolicy(model, Topology(), Loss(), Optimizer(), Generation(), seed=3)

    stayed, moved = policy(), policy()
    residence = Residence(DEVICE, moved.trained.tensors, moves=True, copy=Journal().copy)
    for _ in range(2):
        stayed.update(experience(5))
        residence.come_back()
        moved.update(experience(5))
        residence.leave()
    held = sum(tensor.nbytes for tensor in moved.model.parameters.values())
    assert residence.come_back() == 3 * held
    for name, tensor in stayed.model.parameters.items():
        assert torch.equal(tensor, moved.model.parameters[name]), name


def test_who_is_there_or_gone_already_moves_nothing():
    journal, (model, optimizer) = Journal(), trained()
    residence = Residence(DEVICE, lambda: tensors_of(model, optimizer), moves=True, copy=journal.copy)
    assert residence.come_back() == 0
    residence.leave()
    assert residence.leave() == 0
    assert journal.sent == ["cpu"] * 2


def test_on_a_cpu_nothing_moves():
    model, optimizer = trained()
    residence = Residence(HOST, lambda: tensors_of(model, optimizer))
    before = [tensor.data_ptr() for tensor in model.parameters()]
    assert (residence.moves, residence.leave(), residence.come_back()) == (False, 0, 0)
    assert [tensor.data_ptr() for tensor in model.parameters()] == before
