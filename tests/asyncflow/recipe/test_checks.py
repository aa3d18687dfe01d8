"""Errors in a recipe are found before a model is loaded, with one line that says where and how to fix it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from asyncflow.dataflow.graph import DataflowError
from asyncflow.dataflow.registry import algorithm_named
from asyncflow.dataflow.steering import with_steering
from asyncflow.dataflow.trace import trace
from asyncflow.recipe.checks import LOSSES, check
from asyncflow.recipe.config import BadInput
from asyncflow.recipe.service_specs import stateful
from tests import families, tiny
from tests.asyncflow.conftest import MakeRecipe
from workers.losses import POLICY_LOSSES

RIGHT = {"name": "right", "rule": "exact_match"}


@pytest.fixture
def refused(make_recipe: MakeRecipe) -> Any:
    """The message that refuses a recipe with these changes."""

    def of(**changes: Any) -> str:
        with pytest.raises(BadInput) as error:
            check(make_recipe(**changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    return of


def test_a_sound_recipe_comes_back_with_what_was_read(make_recipe: MakeRecipe, data: Path):
    checked = check(make_recipe())
    assert checked.dataflow.name == "ppo"
    assert len(checked.train) == 30
    assert [(wanted.name, len(source)) for wanted, source in checked.heldout] == [("", 10)]


def test_paths_become_absolute(make_recipe: MakeRecipe, models: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    """Services run in other processes, with other working directories."""
    monkeypatch.chdir(models.parent)
    policy = {"path": f"{models.name}/policy", "learning_rate": 1e-3}
    recipe = check(make_recipe(models={"policy": policy}, folder="runs")).recipe
    assert recipe.models["policy"].path == str(models / "policy")
    assert recipe.folder == str(models.parent / "runs")
    assert recipe.models["reward"].rule == ""


def test_without_heldout_data_there_is_no_evaluation(make_recipe: MakeRecipe):
    assert check(make_recipe(data={"eval": ""})).heldout == []


def test_the_losses_that_a_recipe_may_name_are_those_there_are():
    assert set(LOSSES) == POLICY_LOSSES.keys()


# --- the algorithm and its arguments


def test_an_unknown_algorithm(refused: Any):
    assert refused(algorithm="pppo").startswith("recipe: algorithm 'pppo', did you mean 'ppo'?; known: ppo, remax")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"gama": 1.0}, "advantage.gama: gae has no such argument, did you mean 'gamma'?"),
        ({"zzz": 1.0}, "advantage.zzz: gae has no such argument; known: gae_lambda, gamma, kl, kl_coefficient"),
        ({"gamma": "high"}, "advantage.gamma = 'high': want a value like 1.0"),
        ({"gamma": True}, "advantage.gamma = True: want a value like 1.0"),
        ({"whiten_advantages": 1.0}, "advantage.whiten_advantages = 1.0: want a value like True"),
        ({"kl_estimator": "k9"}, "advantage.kl_estimator = 'k9': want a value like 'k1'"),
    ],
)
def test_numbers_of_the_advantage_are_checked(refused: Any, numbers: dict[str, Any], message: str):
    assert refused(advantage=numbers).startswith(message)


def test_an_adaptive_kl_coefficient_is_a_state_of_the_batch_function(make_recipe: MakeRecipe):
    numbers = {"kl": "adaptive", "kl_target": 0.02, "kl_horizon": 1000}
    steered, fixed = check(make_recipe(advantage=numbers)), check(make_recipe())
    assert stateful(steered.dataflow) == ["critic", "policy", "advantage"]
    assert stateful(fixed.dataflow) == ["critic", "policy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": {"kl": "adaptve"}}, "advantage.kl = 'adaptve': want a value like 'fixed'"),
        ({"advantage": {"kl_target": 0.1}}, "advantage.kl_target: a fixed coefficient has none; add kl = 'adaptive'"),
        ({"advantage": {"kl": "adaptive", "kl_target": 0}}, "advantage.kl = 'adaptive': target = 0.0"),
        (
            {"advantage": {"kl": "adaptive", "kl_horizon": 1}},
            "advantage.kl = 'adaptive': 8 samples a step at a horizon of 1: one step could take the KL coefficient",
        ),
        (
            {"algorithm": "dapo", "advantage": {"kl": "adaptive", "kl_coefficient": 0.1, "gae_lambda": 1.0}},
            "advantage.kl_coefficient: dapo has no such argument",
        ),
    ],
)
def test_a_kl_coefficient_that_can_not_be_steered(refused: Any, changes: dict[str, Any], message: str):
    assert refused(**changes).startswith(message)


def test_a_dataflow_without_a_kl_coefficient_has_nothing_to_steer():
    dataflow = trace(algorithm_named("grpo"))
    with pytest.raises(DataflowError, match=r"grpo#1 takes no kl_coefficient: advantage\.kl = 'adaptive'"):
        with_steering(dataflow, {"kl": "adaptive"})


# --- mixed rewards and pretraining text


def test_the_models_of_a_mixed_reward_are_checked_and_their_paths_absolute(
    make_recipe: MakeRecipe, models: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(models.parent)
    part = {"name": "liked", "path": f"{models.name}/reward"}
    recipe = check(make_recipe(models={"reward": {"mix": [part, RIGHT]}})).recipe
    assert recipe.models["reward"].folders == [str(models / "reward")]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"mix": [RIGHT, RIGHT]}, "models.reward.mix: name = 'right' occurs twice"),
        ({"mix": [RIGHT], "rule": "exact_match"}, "models.reward: a mix has its models in its parts"),
        ({"mix": [{"name": "a", "rule": "exact_mach"}]}, "models.reward.mix.a.rule: rule 'exact_mach' is none of"),
        ({"mix": [{"name": "a", "path": "nowhere"}]}, "models.reward.mix.a.path: no folder "),
        ({"mix": [{"name": "a"}]}, "recipe: mix a: give a path or a rule, one of them"),
    ],
)
def test_a_mix_that_can_not_score(refused: Any, reward: dict[str, Any], message: str):
    assert refused(models={"reward": reward}).startswith(message)


def test_only_rewards_are_mixed(refused: Any):
    said = refused(
        algorithm="safe_rlhf", models={"cost": {"mix": [RIGHT]}, "cost_critic": {"path": "x", "learning_rate": 1}}
    )
    assert said.startswith("models.cost.mix: only rewards are mixed")


def test_a_pretraining_text_is_read_before_anything_starts(refused: Any, make_recipe: MakeRecipe, tmp_path: Path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "1+1 is 2"}')
    recipe = check(make_recipe(data={"pretrain": str(path)}, loss={"ptx_coefficient": 0.1})).recipe
    assert recipe.data.pretrain == str(path)
    for changes in ({"data": {"pretrain": str(path)}}, {"loss": {"ptx_coefficient": 0.1}}):
        assert "the pretraining loss wants both, a text and a coefficient above 0, or neither" in refused(**changes)
    path.write_text('{"words": "1+1 is 2"}')
    assert refused(data={"pretrain": str(path)}, loss={"ptx_coefficient": 0.1}).startswith(f"data.pretrain: {path}")


def test_a_whole_number_will_do_for_a_real_one(make_recipe: MakeRecipe):
    assert check(make_recipe(advantage={"gamma": 1})).recipe.advantage["gamma"] == 1


# --- modes


@pytest.mark.parametrize("change", [{"staleness": 1}, {"runtime": "ray"}, {"threads": 2}])
def test_determinism_has_its_conditions(refused: Any, change: dict[str, Any]):
    message = refused(**change)
    assert message.startswith("deterministic = true needs staleness = 0, runtime = 'local' and threads = 1; got ")
    assert str(next(iter(change.values()))) in message.partition("got")[2]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_rollouts_are_sampled_at_a_temperature(refused: Any, temperature: float):
    assert refused(generation={"temperature": temperature}).startswith(
        f"recipe: generation.temperature = {temperature}: want more than 0"
    )


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"top_p": 0.0}, "recipe: generation.top_p = 0.0: want more than 0, at most 1"),
        ({"top_k": -1}, "recipe: generation.top_k = -1: want 0 or more"),
        ({"min_p": 1.5}, "recipe: generation.min_p = 1.5: want 0 to 1"),
        ({"min_tokens": 6}, "recipe: min_tokens = 6: want less than max_tokens = 6, or no response can end"),
        ({"stop": ["\n", ""]}, "recipe: stop: an empty text would end every response at once"),
        ({"stop_token_ids": [1, 500]}, "generation.stop_token_ids: 500 is no token: the policy's vocabulary has 47"),
        ({"engine": "vllm", "temperature": 2.5}, "recipe: temperature = 2.5: vLLM samples at 0.01 to 2"),
    ],
)
def test_sampling_that_can_not_be(refused: Any, generation: dict[str, Any], message: str):
    assert refused(generation=generation).startswith(message)


def test_an_unknown_loss(refused: Any):
    assert refused(loss={"policy": "ppp"}) == "loss.policy = 'ppp', did you mean 'ppo'?"


def test_a_loss_of_ones_own(make_recipe: MakeRecipe, refused: Any):
    assert check(make_recipe(loss={"policy": "workers.losses.policy:ppo"})).recipe.loss.policy.endswith(":ppo")
    assert refused(loss={"policy": "no_such.place:ppo"}).startswith(
        "loss.policy = 'no_such.place:ppo': module no_such.place: No module named 'no_such'; searched on Python's path"
    )


def test_a_kl_term_in_the_loss_needs_an_algorithm_that_asks_the_reference(
    make_recipe: MakeRecipe, refused: Any, table: dict[str, Any]
):
    check(make_recipe(loss={"kl_coefficient": 0.1}))
    table["advantage"].clear()
    message = refused(algorithm="dapo", loss={"kl_coefficient": 0.1})
    assert message.startswith("loss.kl_coefficient = 0.1: algorithm 'dapo' asks no reference for log-probs")


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "dapo", "gspo", "cispo"])
def test_a_group_has_two_samples_or_more(refused: Any, name: str):
    message = refused(algorithm=name, samples_per_prompt=1)
    assert message == (f"samples_per_prompt = 1: algorithm {name!r} compares the samples of a prompt, want 2 or more")


@pytest.mark.parametrize("name", ["ppo", "remax", "reinforce_pp"])
def test_one_sample_is_enough_where_none_are_compared(make_recipe: MakeRecipe, table: dict[str, Any], name: str):
    table["advantage"].clear()
    check(make_recipe(algorithm=name, samples_per_prompt=1))


# --- models


def test_an_unknown_role(refused: Any, models: Path):
    role = {"path": str(models / "policy")}
    assert refused(models={"critik": role}) == "models.critik: no such role, did you mean 'critic'?"


def test_a_role_that_the_algorithm_needs(refused: Any, table: dict[str, Any]):
    del table["models"]["reference"]
    message = refused()
    assert message.startswith("algorithm 'ppo' needs models.reference, the recipe has policy, critic, reward")


@pytest.mark.parametrize("model", [{}, {"path": "x", "rule": "exact_match"}])
def test_a_model_is_a_path_or_a_rule(refused: Any, model: dict[str, str]):
    assert refused(models={"reward": model}).startswith("models.reward: give a path or a rule, one of them")


@pytest.mark.parametrize("rate", [0.0, -1e-3, float("nan"), float("inf")])
def test_a_trained_model_learns(refused: Any, models: Path, rate: float):
    critic = {"path": str(models / "policy"), "learning_rate": rate}
    assert refused(models={"critic": critic}).startswith(f"models.critic.learning_rate = {rate}")


def test_a_frozen_model_needs_no_learning_rate(make_recipe: MakeRecipe):
    assert make_recipe().models["reference"].learning_rate == 0.0
    check(make_recipe())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_prompt": 2}, "failures.partial_groups = true: with samples_per_prompt = 2 one failure leaves"),
        ({"samples_per_prompt": 4, "loss": {"mini_batches": 9}}, "loss.mini_batches = 9: with failures.partial_groups"),
    ],
)
def test_partial_groups_need_samples_to_lose(refused: Any, changes: dict[str, Any], message: str):
    assert refused(failures={"partial_groups": True}, **changes).startswith(message)


def test_only_rewards_are_rules(refused: Any):
    message = refused(models={"reference": {"rule": "exact_match"}})
    assert message == "models.reference.rule = 'exact_match': only rewards and costs are rules"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("exact_math", "rule 'exact_math' is none of exact_match, prefix_match"),
        ("no.such:f", "No module named 'no'"),
        ("math:nothing", "has no function 'nothing'"),
        (":f", "':f'"),
    ],
)
def test_a_rule_that_is_not_there(refused: Any, rule: str, message: str):
    said = refused(models={"reward": {"rule": rule}})
    assert said.startswith("models.reward.rule: ")
    assert message in said


def test_a_metric_that_is_not_there(refused: Any):
    assert refused(evaluation={"metric": "f1"}).startswith("evaluation.metric: rule 'f1' is none of exact_match")


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of the policy's folder that a test may change."""
    return Path(shutil.copytree(models / "policy", tmp_path / "model"))


def with_critic(refused: Any, folder: Path) -> str:
    return refused(models={"critic": {"path": str(folder), "learning_rate": 1e-3}})


def test_a_model_folder_that_is_not_there(refused: Any, tmp_path: Path):
    missing = tmp_path / "missing"
    assert with_critic(refused, missing) == f"models.critic.path: no folder {missing}"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_folder_without_a_part(refused: Any, folder: Path, file: str):
    (folder / file).unlink()
    message = with_critic(refused, folder)
    assert message.startswith(f"models.critic.path: {folder} ")
    assert file.removeprefix("model") in message


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_model_folder_whose_config_is_garbage(refused: Any, folder: Path, text: str):
    (folder / "config.json").write_text(text)
    assert with_critic(refused, folder).startswith(f"models.critic.path: {folder / 'config.json'}: ")


def test_models_speak_one_vocabulary(refused: Any, folder: Path):
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'"vocab_size": {len(tiny.VOCABULARY)}', '"vocab_size": 40'))
    message = with_critic(refused, folder)
    assert message.startswith(f"models.critic: {folder} has 40 rows of vocabulary, and the policy's tokens have ids up")


def test_rows_beyond_the_tokenizers_ids_may_differ(make_recipe: MakeRecipe, tmp_path: Path):
    """Vocabularies are padded to sizes that suit a machine."""
    padded = tiny.make_policy(tmp_path / "padded", vocabulary=len(tiny.VOCABULARY) + 9)
    check(make_recipe(models={"critic": {"path": str(padded), "learning_rate": 1e-3}}))


def test_a_tokenizer_written_in_another_form_is_the_same(make_recipe: MakeRecipe, folder: Path):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": content["added_tokens"][::-1]}))
    check(make_recipe(models={"critic": {"path": str(folder), "learning_rate": 1e-3}}))


def test_all_models_must_have_one_tokenizer(refused: Any, folder: Path):
    """Two tokens are swapped: the vocabulary has the same size, but texts have other ids."""
    tokenizer = folder / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"a": 12', '"a": 13').replace('"b": 13', '"b": 12'))
    assert tokenizer.read_text() != text
    assert with_critic(refused, folder).startswith("models.critic: its tokenizer differs from the policy's")
    assert "the token 'a' has id 12 in" in with_critic(refused, folder)
    tokenizer.unlink()
    assert with_critic(refused, folder).startswith(f"models.critic: {folder} has no tokenizer.json, the only form")


def test_the_policy_names_a_token_that_ends_a_response(refused: Any, folder: Path):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("eos_token")}))
    policy = {"path": str(folder), "learning_rate": 1e-3}
    message = refused(models={"policy": policy})
    assert message.startswith(f"models.policy.path: model folder {folder}: no eos_token_id in generation_config.json")


def test_the_policy_has_a_tokenizer_that_can_be_read(refused: Any, folder: Path):
    all_of_them = {r: {"path": str(folder), "learning_rate": 1e-3} for r in ("policy", "critic", "reference")}
    all_of_them["reward"] = {"rule": "exact_match"}
    (folder / "tokenizer.json").write_text("{}")
    assert f"tokenizer {folder / 'tokenizer.json'} can't be read" in refused(models=all_of_them)
    (folder / "tokenizer.json").unlink()
    assert refused(models=all_of_them).startswith(f"models.policy.path: {folder} has no tokenizer.json, the only form")


# --- placement


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pools": {}}, "pools: at least one pool is needed"),
        ({"placement": {"rewards": {"pool": "main"}}}, "placement.rewards: no such service, did you mean 'reward'?"),
        ({"placement": {"policy": {"pool": "mian"}}}, "placement.policy.pool = 'mian', did you mean 'main'?"),
        ({"placement": {"policy": {"pool": "main", "parallel": "1-2-1"}}}, "placement.policy: parallel = '1-2-1'"),
        (
            {"placement": {"policy": {"pool": "main", "replicas": 2}}},
            "placement.policy: parallel = '1-1-1', replicas = 2",
        ),
        (
            {"placement": {"policy": {"pool": "main", "parallel": "1-1-2"}}},
            "placement.policy: parallel = '1-1-2', replicas = 1: 2 ranks in pool 'main' of 1 devices",
        ),
        (
            {"placement": {"reference": {"pool": "main", "parallel": "1-1-2"}}},
            "placement.reference: parallel = '1-1-2', replicas = 1: 2 ranks in pool 'main' of 1 devices",
        ),
        (
            {"placement": {"reward": {"pool": "main", "parallel": "two"}}},
            "placement.reward: topology 'two': write p-t-d",
        ),
        (
            {
                "generation": {"engine": "vllm"},
                "runtime": "ray",
                "deterministic": False,
                "pools": {"main": {"devices": 4}},
                "placement": {"policy": {"pool": "main", "parallel": "2-2-1"}},
            },
            "placement.policy: parallel = '2-2-1' generates in 2 stages, and vLLM is fed in one: generation = '1-2', ",
        ),
        (
            {
                "generation": {"engine": "vllm"},
                "pools": {"main": {"devices": 2}},
                "placement": {"policy": {"pool": "main", "parallel": "1-2-1"}},
            },
            "placement.policy.parallel = '1-2-1': ranks that work together need a process each",
        ),
    ],
)
def test_placements_that_this_build_does_not_run(
    refused: Any, table: dict[str, Any], changes: dict[str, Any], message: str
):
    assert refused(**changes).startswith(message)


@pytest.mark.parametrize(
    ("service", "placed", "message"),
    [
        ("policy", {"parallel": "1-3-1"}, ".parallel = '1-3-1': qwen2 decoder: attention heads 4 can't be divided"),
        ("policy", {"parallel": "3-1-1"}, ".parallel = '3-1-1': qwen2 decoder: layers 2 can't be divided over 3 "),
        ("critic", {"parallel": "1-4-1"}, ".parallel = '1-4-1': qwen2 decoder: key-value heads 2 can't be divided"),
        ("policy", {"parallel": "1-2-1"}, ".parallel = '1-2-1': qwen2 decoder: vocabulary 47 can't be divided over 2 "),
        ("policy", {"parallel": "1-2-1", "generation": "2-1"}, ": generation pp 2 does not divide training pp 1 of "),
        ("policy", {"parallel": "1-2-2", "generation": "1-1-4"}, ": generation = '1-1-4': write p-t, "),
        (
            "critic",
            {"parallel": "1-1-2", "generation": "1-1"},
            ".generation = '1-1': only a policy's own ranks generate",
        ),
        ("policy", {"parallel": "1-1-2", "runtime": "local"}, ".parallel = '1-1-2': ranks that work together need a "),
        (
            "policy",
            {"backend": "fsdp"},
            ".backend = 'fsdp': it says what several ranks divide, policy on 1-1-1 has one; leave it out",
        ),
        (
            "reward",
            {"parallel": "1-1-2", "backend": "zero1"},
            ".backend = 'zero1': it divides what training needs, and reward does not train: 'fsdp' divides its weights",
        ),
        ("reference", {"parallel": "1-1-2", "backend": "fsdp", "runtime": "local"}, ".parallel = '1-1-2': ranks that "),
        ("reward", {"recompute": True}, ".recompute = true: it saves memory in training, and reward does not train"),
        (
            "policy",
            {"parallel": "1-1-3", "backend": "fsdp", "generation": "1-3"},
            ".generation = '1-3': qwen2 decoder: attention heads 4 can't be divided over 3 tensor-parallel ranks",
        ),
        ("policy", {"parallel": "two"}, ": topology 'two': write p-t-d"),
        (
            "generator",
            {"parallel": "1-2"},
            ": parallel = '1-2', replicas = 1: this version runs generators of one rank",
        ),
    ],
)
def test_ranks_that_a_model_or_a_runtime_has_no_place_for(
    refused: Any, service: str, placed: dict[str, Any], message: str
):
    runtime = placed.get("runtime", "ray")
    placement = {service: {"pool": "many", **{key: value for key, value in placed.items() if key != "runtime"}}}
    said = refused(
        runtime=runtime, deterministic=False, pools={"main": {}, "many": {"devices": 4}}, placement=placement
    )
    assert said.startswith(f"placement.{service}{message}")


def without_a_plan(folder: Path) -> dict[str, Any]:
    """The recipe's policy and critic of a family without a sharding plan."""
    families.make("gpt2", folder)
    return {role: {"path": str(folder), "learning_rate": 1e-3} for role in ("policy", "critic")}


RANKS = {"runtime": "ray", "deterministic": False, "pools": {"main": {}, "many": {"devices": 4}, "one": {}}}
SHARDED = {"pool": "many", "parallel": "1-1-2", "backend": "fsdp"}


def test_a_family_without_a_plan_is_fully_sharded(make_recipe: MakeRecipe, tmp_path: Path):
    placement = {"policy": SHARDED, "critic": SHARDED, "generator": {"pool": "one"}}
    assert check(make_recipe(models=without_a_plan(tmp_path / "gpt2"), placement=placement, **RANKS)).recipe


@pytest.mark.parametrize(
    ("placement", "where", "instead"),
    [
        (
            {"policy": {"pool": "many", "parallel": "1-2-1"}, "generator": {"pool": "one"}},
            "parallel = '1-2-1'",
            "parallel = '1-1-d' with backend = 'fsdp', which takes any family",
        ),
        # Its ranks would generate with decoder shards.
        ({"policy": SHARDED}, "parallel = '1-1-2'", "a [placement] of generator"),
    ],
)
def test_a_family_without_a_plan_is_not_cut(
    refused: Any, tmp_path: Path, placement: dict[str, Any], where: str, instead: str
):
    said = refused(models=without_a_plan(tmp_path / "gpt2"), placement=placement, **RANKS)
    known = "one of llama, mistral, qwen2, qwen3"
    assert said == f"placement.policy.{where}: model_type 'gpt2' has no sharding plan: {known}; want {instead}"


@pytest.mark.parametrize("placed", [{"parallel": "1-2-1"}, {"parallel": "1-1-2", "backend": "fsdp"}], ids=str)
@pytest.mark.parametrize("reward", [{"rule": "exact_match"}, {"mix": [RIGHT]}], ids=["rule", "mix"])
def test_a_rule_or_a_mix_is_not_divided_over_ranks(refused: Any, reward: dict[str, Any], placed: dict[str, str]):
    placement = {"reward": {"pool": "many", **placed}}
    pools = {"main": {}, "many": {"devices": 2}}
    said = refused(runtime="ray", deterministic=False, models={"reward": reward}, pools=pools, placement=placement)
    assert "a rule or a mix can't be divided over ranks: parallel = '1-1-d' and no backend" in said
