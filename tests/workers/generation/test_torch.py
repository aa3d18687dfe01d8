"""The engine over a transformers module: the tokens that it samples, what it records, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from protocols.data.messages import Finish, Prompts
from protocols.roles import Sampling
from protocols.weights import BadWeights, Version
from tests import tiny
from workers.data.vocabulary import Vocabulary
from workers.generation.engine import FinishedRow, to_rollouts
from workers.generation.in_place import InPlaceWeights
from workers.generation.packed import PackedWeights
from workers.generation.torch import TorchEngine
from workers.settings import Generation
from workers.training.models import canonical_tensors, load_causal

RUN_SEED = 7
PROBE = "12+34=46"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [tiny.make_policy(root / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model(folders: list[Path]) -> PreTrainedModel:
    return load_causal(folders[0])


def engine_of(model: PreTrainedModel, slots: int = 64, run_seed: int = RUN_SEED) -> TorchEngine:
    return TorchEngine(model, Generation(slots=slots), run_seed, tiny.TOKENS, version=Version(0, 3))


def drain(engine: TorchEngine) -> dict[int, FinishedRow]:
    rows: dict[int, FinishedRow] = {}
    while engine.unfinished:
        rows.update((row.sample_id, row) for row in engine.step())
    return rows


def generate(engine: TorchEngine, prompts: Prompts, sampling: Sampling) -> dict[int, FinishedRow]:
    engine.submit(prompts, sampling)
    return drain(engine)


def prompt_by_id(prompts: Prompts) -> dict[int, np.ndarray]:
    return dict(zip(prompts.sample_ids.tolist(), prompts.prompts, strict=True))


MIXED = tiny.make_prompts(["1", "12+3=", "the longest prompt of them all: ", "ab"], samples=4)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probs_are_the_forward_s_at_the_sampling_temperature(model: PreTrainedModel, temperature: float) -> None:
    rows = generate(engine_of(model), MIXED, Sampling(max_tokens=20, temperature=temperature))
    assert rows.keys() == set(MIXED.sample_ids.tolist())
    for sample_id, prompt in prompt_by_id(MIXED).items():
        want = tiny.log_probs(model, prompt, rows[sample_id].tokens, temperature)
        np.testing.assert_allclose(rows[sample_id].log_probs, want, atol=1e-4)


def test_greedy_is_transformers_greedy_and_its_log_probs_are_at_temperature_1(model: PreTrainedModel) -> None:
    prompts = tiny.make_prompts(["1", "12+3=", "another one"])
    rows = generate(engine_of(model), prompts, Sampling(max_tokens=12, temperature=0.0))
    for sample_id, prompt in prompt_by_id(prompts).items():
        inputs = torch.tensor(prompt[None], dtype=torch.int64)
        want = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        assert rows[sample_id].tokens.tolist() == want[0, len(prompt) :].tolist()
        np.testing.assert_allclose(
            rows[sample_id].log_probs, tiny.log_probs(model, prompt, rows[sample_id].tokens), atol=1e-4
        )


def test_a_row_draws_the_same_whatever_it_is_batched_with(model: PreTrainedModel) -> None:
    sampling = Sampling(max_tokens=16)
    together = generate(engine_of(model), MIXED, sampling)
    by_three = generate(engine_of(model, slots=3), MIXED, sampling)
    for sample_id, row in together.items():
        assert row.tokens.tolist() == by_three[sample_id].tokens.tolist()
        np.testing.assert_allclose(row.log_probs, by_three[sample_id].log_probs, atol=1e-5)


def test_the_same_inputs_give_the_same_bits_in_whatever_order_they_come(model: PreTrainedModel) -> None:
    one, two = engine_of(model), engine_of(model)
    for order, engine in ((range(4), one), (reversed(range(4)), two)):
        for i in order:
            engine.submit(tiny.make_prompts(["12+3=", "x"], samples=2, first=2 * i), Sampling(max_tokens=9))
    for a, b in zip(one.step(), two.step(), strict=True):
        assert msgspec.msgpack.encode(
            [a.sample_id, a.tokens.tobytes(), a.log_probs.tobytes()]
        ) == msgspec.msgpack.encode([b.sample_id, b.tokens.tobytes(), b.log_probs.tobytes()])


def test_other_samples_retries_and_runs_draw_otherwise(model: PreTrainedModel) -> None:
    prompt, sampling = tiny.make_prompts(["12+3="]), Sampling(max_tokens=24)
    other_sample = tiny.make_prompts(["12+3="], first=1)
    samples = [next(iter(generate(engine_of(model), p, sampling).values())) for p in (prompt, other_sample)]
    retried = engine_of(model)
    retried.submit(prompt, sampling, retry=1)
    samples += [*drain(retried).values(), *generate(engine_of(model, run_seed=8), prompt, sampling).values()]
    assert len({row.tokens.tobytes() for row in samples}) == 4


def test_first_tokens_follow_the_softmax(model: PreTrainedModel) -> None:
    samples, temperature = 4000, 1.3
    prompts = tiny.make_prompts(["7+8="], samples=samples)
    rows = generate(engine_of(model, slots=samples), prompts, Sampling(max_tokens=1, temperature=temperature))
    counts = np.bincount([int(row.tokens[0]) for row in rows.values()], minlength=len(tiny.VOCABULARY))
    vocabulary = np.arange(len(tiny.VOCABULARY), dtype=np.int32).reshape(-1, 1)
    expected = samples * np.exp([tiny.log_probs(model, prompts.prompts[0], t, temperature)[0] for t in vocabulary])
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_response_ends_at_its_end_token_or_its_limit(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    engine.submit(tiny.make_prompts(["a"], samples=200), Sampling(max_tokens=40))
    engine.submit(tiny.make_prompts(["b"], samples=20, first=1), Sampling(max_tokens=3))
    rows = drain(engine)
    assert {row.finish for row in rows.values()} == {Finish.STOP, Finish.LENGTH}
    for row in rows.values():
        ends = np.flatnonzero(row.tokens == tiny.EOS_ID)
        assert ends.tolist() == ([len(row.tokens) - 1] if row.finish is Finish.STOP else [])
        assert row.finish is Finish.STOP or len(row.tokens) in (3, 40)


def test_every_end_token_ends_a_response(model: PreTrainedModel) -> None:
    ends = frozenset({tiny.EOS_ID, 5, 17})
    engine = TorchEngine(model, Generation(), RUN_SEED, Vocabulary(ends), version=Version(0, 3))
    rows = generate(engine, tiny.make_prompts(["a"], samples=200), Sampling(max_tokens=40))
    last = {int(row.tokens[-1]) for row in rows.values() if row.finish is Finish.STOP}
    assert last == ends
    assert all(ends.isdisjoint(row.tokens[:-1].tolist()) for row in rows.values())


def test_aborted_rows_are_gone_and_their_samples_may_come_again(model: PreTrainedModel) -> None:
    engine, sampling = engine_of(model, slots=4), Sampling(max_tokens=4)
    engine.submit(MIXED, sampling)
    assert engine.step()
    engine.abort()
    assert (engine.unfinished, engine.step()) == (0, [])
    assert generate(engine, MIXED, sampling).keys() == set(MIXED.sample_ids.tolist())


def test_rows_make_a_message_with_their_versions(model: PreTrainedModel) -> None:
    rows = list(generate(engine_of(model), MIXED, Sampling(max_tokens=5)).values())
    rollouts = to_rollouts(MIXED, rows)
    rollouts.check()
    assert set(rollouts.versions.values.tolist()) == {3}


@pytest.mark.parametrize(
    ("text", "sampling", "complaint"),
    [
        ("x" * 1020, Sampling(max_tokens=5), "1020 tokens and max_tokens 5 exceed the model's context of 1024"),
        ("", Sampling(), "prompt is empty"),
        ("x", Sampling(max_tokens=0), "max_tokens"),
        ("x", Sampling(temperature=-1.0), "temperature"),
    ],
)
def test_a_row_that_can_t_run_is_refused_and_none_is_queued(
    model: PreTrainedModel, text: str, sampling: Sampling, complaint: str
) -> None:
    engine, prompts = engine_of(model), tiny.make_prompts(["fine", text])
    with pytest.raises(ValueError, match=complaint) as refusal:
        engine.submit(prompts, sampling)
    assert engine.unfinished == 0
    assert "sampling" in str(refusal.value) or str(prompts.sample_ids[1]) in str(refusal.value)


def test_a_sample_can_t_be_generated_twice_at_a_time(model: PreTrainedModel) -> None:
    engine, prompts = engine_of(model), tiny.make_prompts(["1"])
    engine.submit(prompts, Sampling(max_tokens=1))
    with pytest.raises(ValueError, match="already being generated"):
        engine.submit(prompts, Sampling(max_tokens=1))
    engine.step()
    engine.submit(prompts, Sampling(max_tokens=1))


def test_dropout_is_off_while_generating_and_training_goes_on_after(folders: list[Path]) -> None:
    trained = load_causal(folders[0]).train()
    generate(engine_of(trained), MIXED, Sampling(max_tokens=2))
    assert trained.training
    trained(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()


# Weights.


@pytest.mark.parametrize("tied", [True, False])
def test_a_load_installs_every_tensor_and_the_probe_proves_it(tmp_path: Path, tied: bool) -> None:
    old, new = (load_causal(tiny.make_policy(tmp_path / str(seed), seed, tied)) for seed in (0, 1))
    engine = engine_of(old)
    manifest, buffer = tiny.publish(new, Version(0, 4), PROBE)
    receipt = engine.load(PackedWeights(manifest, buffer))
    assert engine.version == receipt.version == Version(0, 4)
    assert receipt.tensors == len(canonical_tensors(new))
    assert receipt.probe_difference < 1e-5
    rows = generate(engine, MIXED, Sampling(max_tokens=8))
    for sample_id, prompt in prompt_by_id(MIXED).items():
        assert set(rows[sample_id].versions.tolist()) == {4}
        np.testing.assert_allclose(
            rows[sample_id].log_probs, tiny.log_probs(new, prompt, rows[sample_id].tokens), atol=1e-4
        )


def corrupted(publication: PackedWeights) -> PackedWeights:
    manifest, buffer = publication
    wrong = buffer.copy()
    wrong[manifest.tensors[5].start + 3] ^= 0x10
    return PackedWeights(manifest, wrong)


def not_finite(model: PreTrainedModel) -> PackedWeights:
    with torch.no_grad():
        canonical_tensors(model)["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    return tiny.publish(model, Version(0, 5), PROBE)


def without(publication: PackedWeights, name: str) -> PackedWeights:
    manifest, buffer = publication
    return PackedWeights(
        msgspec.structs.replace(manifest, tensors=[e for e in manifest.tensors if e.name != name]), buffer
    )


def answered_otherwise(publication: PackedWeights) -> PackedWeights:
    manifest, buffer = publication
    assert manifest.probe is not None
    shifted = [[x + 0.01 for x in row] for row in manifest.probe.log_probs]
    return PackedWeights(
        msgspec.structs.replace(manifest, probe=msgspec.structs.replace(manifest.probe, log_probs=shifted)), buffer
    )


@pytest.mark.parametrize("fault", ["byte", "nan", "stale", "missing", "unknown", "probe"])
def test_a_bad_publication_is_refused_and_the_old_weights_stay(folders: list[Path], fault: str) -> None:
    engine, new = engine_of(load_causal(folders[0])), load_causal(folders[1])
    before = generate(engine, MIXED, Sampling(max_tokens=6))
    good = tiny.publish(new, Version(0, 5), PROBE)
    bad, complaint = {
        "byte": lambda: (corrupted(good), f"tensor {good[0].tensors[5].name}"),
        "nan": lambda: (not_finite(new), "model.layers.1.mlp.up_proj.weight .* 1 of 16384 values not finite"),
        "stale": lambda: (tiny.publish(new, Version(0, 3), PROBE), "0.3 is not newer than 0.3"),
        "missing": lambda: (without(good, "model.norm.weight"), "lacks 1 of 26 tensors, first model.norm.weight"),
        "unknown": lambda: (
            tiny.publish(load_causal(tiny.make_policy(folders[0] / "untied", 1, tied=False)), Version(0, 5), PROBE),
            "lm_head.weight, which the model does not have",
        ),
        "probe": lambda: (answered_otherwise(good), "log-probs differ by 0.01 .* tolerance 0.001"),
    }[fault]()
    with pytest.raises(BadWeights, match=complaint):
        engine.load(bad)
    assert engine.version == Version(0, 3)
    after = generate(engine, MIXED, Sampling(max_tokens=6))
    assert all(after[i].log_probs.tobytes() == row.log_probs.tobytes() for i, row in before.items())


def test_a_newer_lineage_outranks_a_later_step(folders: list[Path]) -> None:
    engine = engine_of(load_causal(folders[0]))
    engine.load(tiny.publish(load_causal(folders[1]), Version(1, 0), PROBE))
    with pytest.raises(BadWeights, match=r"0\.9 is not newer than 1\.0"):
        engine.load(tiny.publish(load_causal(folders[2]), Version(0, 9), PROBE))


def test_bfloat16_travels_and_is_searched_for_infinities(folders: list[Path]) -> None:
    engine, new = engine_of(load_causal(folders[0])), load_causal(folders[1], "bfloat16")
    assert engine.load(tiny.publish(new, Version(0, 4), PROBE, tolerance=0.3)).probe_difference > 0
    with torch.no_grad():
        canonical_tensors(new)["model.norm.weight"][0] = -math.inf
    with pytest.raises(BadWeights, match="not finite"):
        engine.load(tiny.publish(new, Version(0, 5)))


def test_an_engine_without_weights_keeps_its_rows_until_they_come(folders: list[Path]) -> None:
    engine = TorchEngine(load_causal(folders[0]), Generation(), RUN_SEED, tiny.TOKENS)
    engine.submit(MIXED, Sampling(max_tokens=2))
    with pytest.raises(RuntimeError, match="16 rows wait"):
        engine.step()
    engine.load(tiny.publish(load_causal(folders[1]), Version(0, 0), PROBE))
    assert len(engine.step()) == 16


def test_a_trained_module_loads_in_place_and_is_sent_nothing(folders: list[Path]) -> None:
    trained = load_causal(folders[0])
    engine = TorchEngine(trained, Generation(), RUN_SEED, tiny.TOKENS, owns_model=False, version=Version(0, 0))
    with torch.no_grad():
        canonical_tensors(trained)["model.embed_tokens.weight"].mul_(1.1)
    engine.load(InPlaceWeights(Version(0, 1)))
    rows = generate(engine, MIXED, Sampling(max_tokens=4))
    assert {int(v) for row in rows.values() for v in row.versions} == {1}
    with pytest.raises(BadWeights, match=r"0\.1 is not newer"):
        engine.load(InPlaceWeights(Version(0, 1)))
    with pytest.raises(RuntimeError, match="its owner trains"):
        engine.load(tiny.publish(trained, Version(0, 2)))
