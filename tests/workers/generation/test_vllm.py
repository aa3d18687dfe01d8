"""The vLLM engine: its log-probs are those of a forward pass of the weights that were published last."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from protocols import weights
from protocols.data.messages import Finish, Prompts
from protocols.roles import Sampling
from protocols.version import InstallReceipt, Version
from protocols.weights import BadWeights
from tests import tiny
from workers.generation.engine import FinishedRow
from workers.generation.packed import PackedWeights
from workers.generation.vllm import VllmEngine
from workers.settings import Generation
from workers.training.models import canonical_tensors, load_causal

pytestmark = pytest.mark.vllm

RUN_SEED = 7
OTHER_END = tiny.VOCABULARY["z"]  # named by the generator's folder
ENDS = {tiny.EOS_ID, OTHER_END}
PROBE = "the probe is longer than three blocks of the cache: " * 8
# Several blocks of the prefix cache, equal in all versions: entries of old weights would be hit.
LONG = tiny.make_prompts(["3+4*5=" * 70, "sort: dcba " * 40], samples=6)


class Published:
    """The engine of this test module, and the models that were published to it."""

    def __init__(self, folder: str, engine: VllmEngine, models: list[PreTrainedModel]) -> None:
        self.folder = folder
        self.engine = engine
        self.models = models
        self.term = 2
        self.step = 0

    def next_version(self) -> Version:
        self.step += 1
        return Version(self.term, self.step)

    def publish(self, model: PreTrainedModel) -> InstallReceipt:
        return self.engine.load(tiny.publish(model, self.next_version(), PROBE))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    root = tmp_path_factory.mktemp("models")
    folders = [tiny.make_policy(root / str(seed), seed, tied=request.param) for seed in range(5)]
    # Sampling defaults of a folder must change nothing, and its end token counts beside the tokenizer's.
    defaults = {"eos_token_id": [OTHER_END], "temperature": 0.2, "top_k": 1, "top_p": 0.1, "repetition_penalty": 3.0}
    (folders[0] / "generation_config.json").write_text(json.dumps(defaults))
    engine = VllmEngine(str(folders[0]), Generation(slots=64, kv_cache_bytes=2 * 1024 * 1024), RUN_SEED)
    yield Published(str(folders[0]), engine, [load_causal(folder) for folder in folders])
    engine.close()


def drain(engine: VllmEngine) -> dict[int, FinishedRow]:
    rows: dict[int, FinishedRow] = {}
    while engine.unfinished:
        rows.update((row.sample_id, row) for row in engine.step())
    return rows


def generate(engine: VllmEngine, prompts: Prompts, sampling: Sampling) -> dict[int, FinishedRow]:
    engine.submit(prompts, sampling)
    return drain(engine)


def assert_drawn_by(
    model: PreTrainedModel, prompts: Prompts, rows: dict[int, FinishedRow], temperature: float = 1.0
) -> None:
    assert rows.keys() == set(prompts.sample_ids.tolist())
    for sample_id, prompt in zip(prompts.sample_ids.tolist(), prompts.prompts, strict=True):
        want = tiny.log_probs(model, prompt, rows[sample_id].tokens, temperature)
        np.testing.assert_allclose(rows[sample_id].log_probs, want, atol=1e-4)


def test_it_serves_nothing_before_the_first_publication(published: Published) -> None:
    engine = published.engine
    assert engine.version is None
    engine.submit(LONG, Sampling(max_tokens=2))
    with pytest.raises(RuntimeError, match="12 rows wait, but no verified weights"):
        engine.step()
    with pytest.raises(BadWeights, match="probe: log-probs differ by"):  # vLLM itself accepts incomplete weights
        engine.load(without("model.norm.weight", tiny.publish(published.models[0], published.next_version(), PROBE)))
    assert engine.version is None
    published.publish(published.models[0])
    assert_drawn_by(published.models[0], LONG, drain(engine))


def test_every_publication_is_what_generates(published: Published) -> None:
    for model in published.models:
        receipt = published.publish(model)
        assert receipt.version == published.engine.version
        assert receipt.tensors == len(canonical_tensors(model))
        assert receipt.probe_difference < 1e-4
        rows = generate(published.engine, LONG, Sampling(max_tokens=8, temperature=1.2))
        assert_drawn_by(model, LONG, rows, temperature=1.2)
        assert {int(v) for row in rows.values() for v in row.versions} == {published.step}


def test_a_load_in_the_middle_splits_rows_between_two_versions(published: Published) -> None:
    old, new = published.models[1], published.models[2]
    engine, sampling = published.engine, Sampling(max_tokens=30)
    published.publish(old)
    before = published.step
    engine.submit(LONG, sampling)
    rows = {row.sample_id: row for _ in range(9) for row in engine.step()}
    published.publish(new)
    rows |= drain(engine)
    assert rows.keys() == set(LONG.sample_ids.tolist())
    crossed = 0
    for sample_id, prompt in zip(LONG.sample_ids.tolist(), LONG.prompts, strict=True):
        row = rows[sample_id]
        cut = int((row.versions == before).sum())
        assert row.versions.tolist() == [before] * cut + [before + 1] * (len(row.tokens) - cut)
        np.testing.assert_allclose(row.log_probs[:cut], tiny.log_probs(old, prompt, row.tokens)[:cut], atol=1e-4)
        np.testing.assert_allclose(row.log_probs[cut:], tiny.log_probs(new, prompt, row.tokens)[cut:], atol=1e-4)
        assert len(row.tokens) <= 30
        assert (row.finish is Finish.STOP) == (int(row.tokens[-1]) in ENDS)
        assert row.finish is Finish.STOP or len(row.tokens) == 30
        crossed += 0 < cut < len(row.tokens)
    assert crossed >= 6


def test_a_continued_row_draws_from_a_new_seed(published: Published) -> None:
    engine, model = published.engine, published.models[1]
    rows = []
    for interrupted_at in (None, 3, 3, 5):
        published.publish(model)
        engine.submit(LONG, Sampling(max_tokens=12))
        if interrupted_at:
            for _ in range(interrupted_at):
                assert not (early := engine.step()) or all(row.finish is Finish.STOP for row in early)
            published.publish(model)
        rows.append({i: row.tokens.tolist() for i, row in drain(engine).items()})
    whole, at_three, again, at_five = rows
    shared = whole.keys() & at_three.keys() & at_five.keys()
    assert at_three == again
    assert all(whole[i][:3] == at_three[i][:3] and whole[i][:5] == at_five[i][:5] for i in shared)
    assert any(whole[i][3:] != at_three[i][3:] for i in shared)


def test_a_load_of_another_lineage_begins_rows_anew(published: Published) -> None:
    engine, sampling = published.engine, Sampling(max_tokens=10)
    published.publish(published.models[1])
    engine.submit(LONG, sampling)
    early = {row.sample_id for _ in range(4) for row in engine.step()}
    published.term += 1
    published.publish(published.models[2])
    rows = drain(engine)
    assert rows.keys() == set(LONG.sample_ids.tolist()) - early
    undisturbed = generate(engine, LONG, sampling)
    for sample_id, row in rows.items():
        assert set(row.versions.tolist()) == {published.step}
        assert row.tokens.tolist() == undisturbed[sample_id].tokens.tolist()


# Refusals.


def corrupted(published: Published) -> PackedWeights:
    manifest, buffer = tiny.publish(published.models[2], Version(published.term, published.step + 1), PROBE)
    buffer[manifest.tensors[7].start + 1] ^= 1
    return PackedWeights(manifest, buffer)


def not_finite(published: Published) -> PackedWeights:
    model = published.models[2]
    tensor = canonical_tensors(model)["model.layers.0.self_attn.k_proj.bias"]
    kept = tensor[5].clone()
    tensor[5] = math.nan
    publication = tiny.publish(model, Version(published.term, published.step + 1))
    tensor[5] = kept
    return publication


def without(name: str, publication: PackedWeights) -> PackedWeights:
    manifest, buffer = publication
    return PackedWeights(
        msgspec.structs.replace(manifest, tensors=[e for e in manifest.tensors if e.name != name]), buffer
    )


def incomplete(published: Published) -> PackedWeights:
    name = "model.layers.0.self_attn.q_proj.weight"
    return without(name, tiny.publish(published.models[2], Version(published.term, published.step + 1), PROBE))


def misshapen(published: Published) -> PackedWeights:
    manifest, buffer = tiny.publish(published.models[2], Version(published.term, published.step + 1), PROBE)
    tensors = [msgspec.structs.replace(e, shape=e.shape[::-1]) for e in manifest.tensors]
    return PackedWeights(msgspec.structs.replace(manifest, tensors=tensors), buffer)


def stale(published: Published) -> PackedWeights:
    return tiny.publish(published.models[2], Version(published.term - 1, published.step + 5), PROBE)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (corrupted, "bytes received are not"),
        (not_finite, r"k_proj\.bias .* 1 of 64 values not finite"),
        (stale, "is not newer than"),
        (incomplete, r"lacks 1 of \d\d tensors, first model\.layers\.0\.self_attn\.q_proj\.weight"),
        (misshapen, r"embed_tokens\.weight .* is \(128, 47\), the model's \(47, 128\)"),
    ],
)
def test_a_publication_refused_on_arrival_changes_nothing(
    published: Published, fault: Callable[[Published], PackedWeights], complaint: str
) -> None:
    engine = published.engine
    published.publish(published.models[1])
    engine.submit(LONG, Sampling(max_tokens=6))
    early = engine.step()
    with pytest.raises(BadWeights, match=complaint):
        engine.load(fault(published))
    assert engine.version == Version(published.term, published.step)
    rows = {row.sample_id: row for row in early} | drain(engine)
    assert_drawn_by(published.models[1], LONG, rows)


def with_other_values(name: str, publication: PackedWeights, value: float | None = None) -> PackedWeights:
    """A publication in which one tensor has other values and a matching digest, as if the engine had dropped it."""
    manifest, buffer = publication
    (entry,) = (e for e in manifest.tensors if e.name == name)
    data = buffer[entry.start : entry.start + entry.nbytes].view(np.float32)
    data[:] = data[::-1].copy() if value is None else value
    replaced = msgspec.structs.replace(entry, digest=weights.digest(data))
    tensors = [replaced if e is entry else e for e in manifest.tensors]
    return PackedWeights(msgspec.structs.replace(manifest, tensors=tensors), buffer)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda p: with_other_values("model.embed_tokens.weight", p), "log-probs differ by"),
        (lambda p: with_other_values("model.layers.1.mlp.down_proj.weight", p), "log-probs differ by"),
        (lambda p: with_other_values("model.layers.1.self_attn.v_proj.bias", p), "log-probs differ by"),
        (lambda p: with_other_values("model.norm.weight", p), "log-probs differ by"),
        (lambda p: with_other_values("model.layers.0.mlp.down_proj.weight", p, 3e38), "log-probs differ by nan"),
    ],
    ids=["embedding", "linear", "bias", "norm", "overflow"],
)
def test_what_only_the_probe_sees_silences_the_engine_until_good_weights_come(
    published: Published, damage: Callable[[PackedWeights], PackedWeights], complaint: str
) -> None:
    engine, old, new = published.engine, published.models[1], published.models[3]
    published.publish(old)
    engine.submit(LONG, Sampling(max_tokens=6))
    rows = {row.sample_id: row for row in engine.step()}
    with pytest.raises(BadWeights, match=complaint):
        engine.load(damage(tiny.publish(new, published.next_version(), PROBE)))
    assert engine.version is None
    with pytest.raises(RuntimeError, match="no verified weights"):
        engine.step()
    published.publish(new)
    rows |= drain(engine)
    assert rows.keys() == set(LONG.sample_ids.tolist())
    assert_drawn_by(new, LONG, generate(engine, LONG, Sampling(max_tokens=6)))


# Drawing.


def test_a_sample_draws_the_same_whatever_it_is_batched_with(published: Published) -> None:
    published.publish(published.models[4])
    sampling = Sampling(max_tokens=10)
    prompts = tiny.make_prompts(["12+34=", "ab"], samples=3)
    together = generate(published.engine, prompts, sampling)
    for prompt in (tiny.make_prompts(["12+34="], samples=3), tiny.make_prompts(["ab"], samples=3, first=1)):
        for sample_id, row in generate(published.engine, prompt, sampling).items():
            assert row.tokens.tolist() == together[sample_id].tokens.tolist()


def test_other_samples_and_retries_draw_otherwise(published: Published) -> None:
    published.publish(published.models[4])
    prompts, sampling = tiny.make_prompts(["12+34="], samples=4), Sampling(max_tokens=20)
    first = generate(published.engine, prompts, sampling)
    published.engine.submit(prompts, sampling, retry=1)
    samples = [row.tokens.tobytes() for rows in (first, drain(published.engine)) for row in rows.values()]
    assert len(set(samples)) == 8


def test_the_order_of_submission_decides_nothing(published: Published) -> None:
    published.publish(published.models[4])
    runs = []
    for order in (range(4), reversed(range(4))):
        for i in order:
            published.engine.submit(tiny.make_prompts(["12+34=", "q"], samples=2, first=2 * i), Sampling(max_tokens=8))
        rows = drain(published.engine)
        runs.append([(i, rows[i].tokens.tobytes(), rows[i].log_probs.tobytes()) for i in sorted(rows)])
    assert runs[0] == runs[1]


def test_greedy_is_transformers_greedy_also_beside_sampled_rows(published: Published) -> None:
    model, engine = published.models[2], published.engine
    published.publish(model)
    greedy, sampled = tiny.make_prompts(["12+34=", "sort: dcba"]), tiny.make_prompts(["a"], samples=5, first=9)
    engine.submit(sampled, Sampling(max_tokens=12, temperature=0.8))
    engine.submit(greedy, Sampling(max_tokens=12, temperature=0.0))
    rows = drain(engine)
    for sample_id, prompt in zip(greedy.sample_ids.tolist(), greedy.prompts, strict=True):
        inputs = torch.tensor(prompt[None], dtype=torch.int64)
        ends = {"eos_token_id": list(ENDS), "max_new_tokens": 12}
        want = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, **ends)  # type: ignore[operator]
        assert rows[sample_id].tokens.tolist() == want[0, len(prompt) :].tolist()
    assert_drawn_by(model, greedy, {i: rows[i] for i in greedy.sample_ids.tolist()})
    assert_drawn_by(model, sampled, {i: rows[i] for i in sampled.sample_ids.tolist()}, temperature=0.8)


def test_a_response_ends_at_its_end_token_or_its_limit(published: Published) -> None:
    published.publish(published.models[0])
    rows = generate(published.engine, tiny.make_prompts(["a"], samples=100), Sampling(max_tokens=40))
    assert {row.finish for row in rows.values()} == {Finish.STOP, Finish.LENGTH}
    for row in rows.values():
        ends = np.flatnonzero(np.isin(row.tokens, list(ENDS)))
        assert ends.tolist() == ([len(row.tokens) - 1] if row.finish is Finish.STOP else [])
        assert row.finish is Finish.STOP or len(row.tokens) == 40
    stopped_by = {int(row.tokens[-1]) for row in rows.values() if row.finish is Finish.STOP}
    assert stopped_by == ENDS


def test_more_prompts_than_one_step_takes_wait_whole(published: Published) -> None:
    """Chunked prefill rewinds a seeded generator, which generators on the CPU do not support."""
    published.publish(published.models[0])
    prompts = tiny.make_prompts([f"{i:02d}+" * 140 for i in range(14)])  # 420 tokens each
    rows = generate(published.engine, prompts, Sampling(max_tokens=4))
    assert_drawn_by(published.models[0], prompts, rows)


def test_aborted_rows_are_gone_and_their_samples_draw_the_same_when_they_come_again(published: Published) -> None:
    published.publish(published.models[0])
    engine, sampling = published.engine, Sampling(max_tokens=8)
    whole = generate(engine, LONG, sampling)
    engine.submit(LONG, sampling)
    engine.step()
    engine.submit(tiny.make_prompts(["7"], first=500), sampling)  # one that waits
    engine.abort()
    assert (engine.unfinished, engine.step()) == (0, [])
    again = generate(engine, LONG, sampling)
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[sample].tokens, row.tokens) for sample, row in whole.items())


def test_a_row_that_does_not_fit_is_refused_and_none_is_queued(published: Published) -> None:
    prompts = tiny.make_prompts(["fine", "x" * 1000])
    with pytest.raises(ValueError, match=f"sample {prompts.sample_ids[1]}: prompt of 1000 tokens and max_tokens 25"):
        published.engine.submit(prompts, Sampling(max_tokens=25))
    assert published.engine.unfinished == 0


def test_a_second_engine_in_the_process_is_refused_and_costs_the_first_nothing(published: Published):
    published.publish(published.models[0])
    with pytest.raises(RuntimeError, match=r"another run of this program has it: .* runtime = 'ray'"):
        VllmEngine(published.folder, Generation(slots=64, kv_cache_bytes=2 * 1024 * 1024), RUN_SEED)
    prompts = tiny.make_prompts(["1+2="], samples=1)
    assert generate(published.engine, prompts, Sampling(max_tokens=2))
