"""Only adapters train; publications, checkpoints and exports behave like the adapted policy."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM

from protocols.data.messages import Experience, Rollouts
from protocols.weights import BadWeights, Version
from tests import families, tiny
from tests.workers.batches import experience, rollouts
from workers.generation.packed import received
from workers.generation.torch import TorchEngine
from workers.parallel.merged import merged
from workers.roles.policy import PolicyWorker
from workers.settings import Generation, Lora, Loss, Model, Optimizer
from workers.training.lora import A, Adapters, B, merge, unadaptable
from workers.training.models import canonical_tensors, load_causal

STEPS = 3
LORA = Lora(rank=4, alpha=12.0, targets=["q_proj", "down_proj"])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_policy(tmp_path_factory.mktemp("policy"), tied=request.param)


@pytest.fixture(scope="module")
def batch() -> Experience:
    batch = experience(8)
    texts = {name: getattr(batch, name) for name in ("prompts", "responses")}
    last = len(tiny.VOCABULARY) - 1
    return msgspec.structs.replace(batch, **{n: t.with_values(np.minimum(t.values, last)) for n, t in texts.items()})


def make(folder: Path, lora: Lora = LORA, loss: Loss | None = None) -> PolicyWorker:
    return PolicyWorker(Model(str(folder), learning_rate=1e-2, lora=lora), loss or Loss(), Optimizer(), Generation(), 3)


@pytest.fixture(scope="module")
def trained(folder: Path, batch: Experience) -> PolicyWorker:
    worker = make(folder)
    for _ in range(STEPS):
        worker.update(batch)
    return worker


def answers(worker: PolicyWorker, batch: Experience) -> np.ndarray:
    return worker.log_probs(rollouts(batch)).log_probs.values


def plain_answers(model: torch.nn.Module, batch: Rollouts) -> np.ndarray:
    """Log-probs from separate forward passes: one row at a time, without adapters."""
    pairs = zip(batch.prompts, batch.responses, strict=True)
    return np.concatenate([tiny.log_probs(model, p, r) for p, r in pairs])  # type: ignore[arg-type]


def base_tensors(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    everything = canonical_tensors(worker.model.module)
    return {n.replace(".base_layer.", "."): t for n, t in everything.items() if ".lora_" not in n}


def merged_tensors(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    with merged(worker.model):
        return {name: tensor.clone() for name, tensor in worker.trained.collect().items()}


def test_at_first_the_policy_answers_as_its_base(folder: Path, batch: Experience):
    plain = plain_answers(load_causal(folder), rollouts(batch))
    np.testing.assert_allclose(answers(make(folder), batch), plain, atol=1e-5)


def test_training_changes_the_answers_and_no_bit_of_the_base(folder: Path, batch: Experience, trained: PolicyWorker):
    before = dict(canonical_tensors(load_causal(folder)))
    base = base_tensors(trained)
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], before[name]) for name in before)
    assert np.abs(answers(trained, batch) - answers(make(folder), batch)).max() > 0.05


def test_only_adapters_have_gradients_and_moments(trained: PolicyWorker, tmp_path: Path):
    trained.save(str(tmp_path))
    layers = trained.model.config.num_hidden_layers
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    saved = {name: tensor for name, tensor in tensors.items() if not name.startswith("exp_avg")}
    assert len(saved) == 2 * 2 * layers
    assert all(name.endswith((A, B)) for name in saved)
    state = sum(tensor.numel() for name, tensor in tensors.items() if name not in saved)
    assert state == 2 * sum(t.numel() for t in saved.values())
    whole = sum(p.numel() for p in trained.model.module.parameters())
    assert state < 0.1 * whole


def test_the_merged_model_answers_as_the_adapted_one(folder: Path, batch: Experience, trained: PolicyWorker):
    plain = load_causal(folder)
    own = canonical_tensors(plain)
    for name, tensor in merged_tensors(trained).items():
        own[name].copy_(tensor)
    np.testing.assert_allclose(plain_answers(plain, rollouts(batch)), answers(trained, batch), atol=1e-5)


@pytest.mark.parametrize("publish", ["merged", "adapters"])
def test_a_publication_installs_in_an_engine_of_the_base(folder: Path, batch: Experience, publish: str):
    lora = Lora(rank=4, alpha=12.0, targets=LORA.targets, publish=publish)  # type: ignore[arg-type]
    worker = make(folder, lora)
    engine = TorchEngine(load_causal(folder), Generation(), 3, tiny.TOKENS)
    sizes = []
    for step in range(1, STEPS + 1):
        worker.update(batch)
        manifest, buffer = worker.snapshot(Version(0, step))
        receipt = engine.load(received(manifest, buffer, Model(str(folder))))
        assert engine.version == Version(0, step)
        assert receipt.probe_difference < 1e-5
        sizes.append(manifest.total_bytes)
    whole = sum(t.nbytes for t in canonical_tensors(load_causal(folder)).values())
    assert sizes[0] == sizes[-1]
    assert (sizes[0] < 0.1 * whole) == (publish == "adapters")
    engine.close()


@pytest.mark.parametrize("publish", ["merged", "adapters"])
def test_a_publication_of_a_bfloat16_policy_is_proven_at_the_usual_tolerance(
    folder: Path, batch: Experience, publish: str
):
    """W + BA is rounded to bfloat16, so the probe must use the published weights."""
    lora = Lora(rank=4, publish=publish)  # type: ignore[arg-type]
    model = Model(str(folder), learning_rate=1e-2, dtype="bfloat16", lora=lora)
    worker = PolicyWorker(model, Loss(), Optimizer(), Generation(), 3)
    engine = TorchEngine(load_causal(folder, "bfloat16"), Generation(), 3, tiny.TOKENS)
    before = answers(worker, batch)
    worker.update(batch)
    assert engine.load(received(*worker.snapshot(Version(0, 1)), model)).probe_difference < 1e-5
    assert np.abs(answers(worker, batch) - before).max() > 0.05, "asking for the probe has left the adapters in place"
    engine.close()


def test_adapters_of_another_base_are_refused(folder: Path, tmp_path: Path):
    other = tiny.make_policy(tmp_path / "other", heads=2, kv_heads=1)
    manifest, buffer = make(folder, Lora(rank=2, publish="adapters")).snapshot(Version(0, 1))
    engine = TorchEngine(load_causal(other), Generation(), 3, tiny.TOKENS)
    with pytest.raises(BadWeights, match=r"version 0\.1: adapter of model.layers.0.*the base has one of \[64, 64\]"):
        engine.load(received(manifest, buffer, Model(str(other))))
    assert engine.version is None


def test_a_restored_policy_goes_on_as_if_it_had_not_stopped(folder: Path, batch: Experience, tmp_path: Path):
    going_on, restored = make(folder), make(folder)
    for _ in range(STEPS):
        going_on.update(batch)
    going_on.save(str(tmp_path))
    restored.load(str(tmp_path))
    assert restored.trained.version == STEPS
    for worker in (going_on, restored):
        worker.update(batch)
    assert np.array_equal(answers(going_on, batch), answers(restored, batch))


def test_a_whole_models_checkpoint_is_refused(folder: Path, tmp_path: Path):
    make(folder, Lora()).save(str(tmp_path))
    with pytest.raises(ValueError, match="tensors differ from the model's"):
        make(folder).load(str(tmp_path))


def test_the_same_adapters_at_another_scaling_are_refused(folder: Path, trained: PolicyWorker, tmp_path: Path):
    trained.save(str(tmp_path))
    other = make(folder, Lora(rank=4, alpha=8.0, targets=LORA.targets))
    with pytest.raises(
        ValueError, match=r"adapter scaling is 3\.0 in the checkpoint, 2\.0 in this model.*keep lora\.alpha"
    ):
        other.load(str(tmp_path))
    assert other.trained.version == 0


def test_adapters_of_a_bfloat16_base_lose_no_small_update(folder: Path, batch: Experience):
    model = Model(str(folder), learning_rate=1e-4, dtype="bfloat16", lora=LORA)
    worker = PolicyWorker(model, Loss(), Optimizer(), Generation(), 3)
    worker.update(batch)  # B is no longer 0, so A has a gradient from now on
    before = {name: tensor.clone() for name, tensor in worker.trained.collect_adapters().items()}
    worker.update(batch)
    moved = [float((t != before[n]).float().mean()) for n, t in worker.trained.collect_adapters().items()]
    assert min(moved) > 0.9
    assert merged_tensors(worker)["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_the_export_loads_merged_in_transformers_and_apart_in_peft(
    folder: Path, batch: Experience, trained: PolicyWorker, tmp_path: Path
):
    from peft import PeftModel

    trained.export(str(tmp_path))
    want = answers(trained, batch)
    np.testing.assert_allclose(plain_answers(load_causal(tmp_path), rollouts(batch)), want, atol=1e-5)
    apart = PeftModel.from_pretrained(load_causal(folder), str(tmp_path / "adapters")).eval()
    np.testing.assert_allclose(plain_answers(apart, rollouts(batch)), want, atol=1e-5)
    assert (tmp_path / "tokenizer.json").exists()


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPERTS = {"gate_up_proj", "down_proj"}
SIZES = {"vocab_size": len(tiny.VOCABULARY), "initializer_range": 0.1, "bos_token_id": None}
SIZES |= {"eos_token_id": tiny.EOS_ID, "pad_token_id": tiny.PAD_ID}


def gpt2(folder: Path) -> Path:
    """Made of transformers' Conv1D; its attention's output layer is square, so no shape tells."""
    config = GPT2Config(**SIZES, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return tiny.save_random(GPT2LMHeadModel, config, folder, 0)


def gpt_oss(folder: Path) -> Path:
    """Its experts' weights are [experts, inputs, outputs]."""
    config = GptOssConfig(
        **SIZES, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    return tiny.save_random(GptOssForCausalLM, config, folder, 0)


FAMILIES = {
    "gpt2": (gpt2, {"c_attn", "c_fc", "c_proj"}),
    "gpt_oss": (gpt_oss, ATTENTION | EXPERTS),
    "qwen3_moe": (partial(families.make, "qwen3_moe"), ATTENTION | EXPERTS),
    "mixtral": (partial(families.make, "mixtral"), ATTENTION | EXPERTS),
}


@pytest.mark.parametrize("publish", ["merged", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_experts_of_every_layout_are_adapted_published_and_exported_alike(
    batch: Experience, tmp_path: Path, family: str, publish: str
):
    from peft import PeftModel

    base, exported = tmp_path / "base", tmp_path / "exported"
    make_folder, layers = FAMILIES[family]
    make_folder(base)
    worker = make(base, Lora(rank=4, alpha=12.0, publish=publish))  # type: ignore[arg-type]
    np.testing.assert_allclose(answers(worker, batch), plain_answers(load_causal(base), rollouts(batch)), atol=1e-5)
    names = {name.removesuffix(A).rpartition(".")[2] for name in worker.trained.collect_adapters() if name.endswith(A)}
    assert names == layers
    engine = TorchEngine(load_causal(base), Generation(), 3, tiny.TOKENS)
    for step in range(1, STEPS + 1):
        before = answers(worker, batch)
        worker.update(batch)
        published = received(*worker.snapshot(Version(0, step)), Model(str(base)))
        assert engine.load(published).probe_difference < 1e-5
        assert np.abs(answers(worker, batch) - before).max() > 0.01
    engine.close()
    assert all(tensor.any() for tensor in worker.trained.collect_adapters().values()), "each B has moved from 0"
    exported.mkdir()
    worker.export(str(exported))
    want = answers(worker, batch)
    np.testing.assert_allclose(plain_answers(load_causal(exported), rollouts(batch)), want, atol=1e-5)
    apart = PeftModel.from_pretrained(load_causal(base), str(exported / "adapters")).eval()
    np.testing.assert_allclose(plain_answers(apart, rollouts(batch)), want, atol=1e-5)


def test_several_optimizer_steps_are_taken_back_together(folder: Path, batch: Experience):
    worker = make(folder, loss=Loss(epochs=2))
    before = merged_tensors(worker)
    with pytest.raises(RuntimeError, match="stop"), worker.trained.update(2):
        for parameter in worker.model.module.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
        raise RuntimeError("stop")
    assert all(torch.equal(t, before[name]) for name, t in merged_tensors(worker).items())


def test_the_adapters_come_from_the_seed_alone(folder: Path):
    torch.manual_seed(1)
    one = make(folder)
    torch.manual_seed(2)
    two = make(folder)
    adapters = two.trained.collect_adapters()
    assert all(torch.equal(tensor, adapters[name]) for name, tensor in one.trained.collect_adapters().items())


def test_targets_are_checked_and_by_default_all_linear_layers_but_the_head(folder: Path):
    adapters = make(folder, Lora(rank=1)).trained.collect_adapters()
    names = {name.removesuffix(A).rpartition(".")[2] for name in adapters if name.endswith(A)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"no linear layer 'c_attn'; it has down_proj, gate_proj"):
        make(folder, Lora(rank=1, targets=["c_attn"]))


def test_merging_is_the_formula():
    base = {"x.weight": torch.arange(6.0).view(2, 3), "y": torch.ones(1)}
    a, b = torch.ones(1, 3), torch.tensor([[1.0], [2.0]])
    merged = merge(base, {"x" + A: a, "x" + B: b}, scaling=0.5)
    assert merged["x.weight"].tolist() == [[0.5, 1.5, 2.5], [4.0, 5.0, 6.0]]
    assert merged["y"] is base["y"]
    assert base["x.weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    turned = merge({"x.weight": base["x.weight"].T}, {"x" + A: a, "x" + B: b}, scaling=0.5, transposed={"x"})
    assert turned["x.weight"].T.tolist() == merged["x.weight"].tolist()


@pytest.mark.parametrize(
    "given", [{"alpha": 16.0}, {"targets": ["q_proj"]}, {"publish": "adapters"}, {"rank": -1}, {"rank": 1, "alpha": -1}]
)
def test_settings_without_meaning_are_refused(given: dict[str, object]):
    with pytest.raises(ValueError, match=r"^(lora: )?(rank|alpha) = "):
        Lora(**given)  # type: ignore[arg-type]


def test_experts_are_adapted_by_name_alone(tmp_path: Path):
    model = load_causal(families.make("qwen3_moe", tmp_path))
    adapted = Adapters(model, str(tmp_path), Lora(rank=2, targets=["experts.down_proj"]), seed=0).weights
    assert [one.name for one in adapted] == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    with pytest.raises(ValueError, match="no linear layer 'up_proj'; it has down_proj, gate_up_proj, k_proj, o_proj"):
        Adapters(load_causal(tmp_path), str(tmp_path), Lora(rank=2, targets=["up_proj"]), seed=0)


def test_of_a_mixture_with_dense_layers_peft_leaves_these_out_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = families.config("qwen3_moe")
    config.mlp_only_layers = [0]
    folder = str(tiny.save_random(AutoModelForCausalLM.from_config, config, tmp_path, 0))
    assert unadaptable(folder, Lora(rank=2)) == ""
    assert "peft adapts all but model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.l" in caplog.text
    for targets in (["gate_proj", "up_proj"], ["gate_proj"]):
        assert re.match(r"lora(\.targets)?: peft can't adapt ", unadaptable(folder, Lora(rank=2, targets=targets)))
