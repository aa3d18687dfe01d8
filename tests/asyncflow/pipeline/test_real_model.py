"""SmolLM2-135M-Instruct goes through all of RLHF by the recipes of deploy/recipes/smollm2, cut to few small steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import asyncflow
from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.demo import smollm2
from asyncflow.recipe.config import Recipe, load_recipe
from asyncflow.run.finetuning import finetune, train_reward
from protocols.control.events import Published, StepCommitted
from protocols.data.ids import prompt_id
from protocols.data.messages import Finish
from protocols.roles import Sampling
from protocols.weights import Version
from workers.data.datasets import read_rows
from workers.data.vocabulary import Vocabulary
from workers.generation.torch import TorchEngine
from workers.settings import Generation
from workers.training.models import load_causal

pytestmark = pytest.mark.timeout(1500)  # a step of the real model on a share of one core

RECIPES = Path(__file__).parents[3] / "deploy" / "recipes" / "smollm2"
SMALL = ["steps=2", "prompts_per_step=2", "samples_per_prompt=2", "runtime=local", "generation.max_tokens=16"]
SMALL += ["data.eval=", "checkpoints.every=0"]
ONE_SMALL_STEP = ["generation.engine=torch", "steps=1", "models.policy.learning_rate=1e-6"]
VARIED = "models.reward.rule=tests.asyncflow.pipeline.rules:varied"  # two samples of a prompt have different rewards
QUESTION = {"role": "user", "content": "What is the capital of France?"}
CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the model and the data, where the recipes expect them."""
    root = tmp_path_factory.mktemp("smollm2")
    smollm2.convert(root / "runs" / "smollm2" / "model")
    smollm2.write_sums(root / "runs" / "smollm2" / "data", train=8, heldout=4, pairs=8)
    return root


@pytest.fixture
def model(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's folder; the test runs in the working directory above."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(RECIPES))
    return home / "runs" / "smollm2" / "model"


def recipe(name: str, *changes: str) -> Recipe:
    return load_recipe(RECIPES / name, [*SMALL, *changes])


def fine_tuning(name: str, folder: Path) -> Path:
    """A file of settings, cut to few steps."""
    text = (RECIPES / name).read_text()
    for is_, becomes in (("steps = 50", "steps = 4"), ("batch_size = 8", "batch_size = 4"), ("= 2e-5", "= 1e-4")):
        assert is_ in text
        text = text.replace(is_, becomes)
    path = folder / name
    path.write_text(text + "\n[optimizer]\nwarmup_steps = 0\n")
    return path


def answer(folder: Path, question: dict[str, str] = QUESTION) -> str:
    """What transformers says with a folder's model, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = loaded.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return tokenizer.decode(tokens)


def test_prompts_have_the_tokens_of_the_chat_template(model: Path, tmp_path: Path):
    chats = [
        [QUESTION],
        [{"role": "system", "content": "Be brief."}, QUESTION],
        [QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of 12 Länder?"}],
    ]
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat, "reference": ""}) + "\n" for chat in chats))
    source = PromptSource(read_rows(rows, DataRow, tokenizer=model), str(model), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = source.requests([prompt_id(0, row) for row in range(3)], 1, min_version=0).prompts
    for chat, prompt in zip(chats, prompts, strict=True):
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt.tolist() == rendered


def test_a_response_ends_at_the_end_of_the_turn(model: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [QUESTION], "reference": ""}))
    source = PromptSource(read_rows(rows, DataRow, tokenizer=model), str(model), seed=0)
    engine = TorchEngine(load_causal(model), Generation(engine="torch"), 0, Vocabulary.of(model), version=Version(0, 0))
    engine.submit(source.requests([prompt_id(0, 0)], 1, min_version=0), Sampling(max_tokens=32, temperature=0.0))
    (row,) = engine.step()
    text = AutoTokenizer.from_pretrained(model).decode(row.tokens.tolist())
    assert (text, row.finish) == ("The capital of France is Paris.<|im_end|>", Finish.STOP)


@pytest.mark.vllm
async def test_grpo_trains_all_weights_and_exports_a_model_that_others_load(model: Path):
    made = recipe("grpo.toml", "staleness=0", VARIED)
    async with asyncflow.launch(made) as run:
        events = [event async for event in run.events()]
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    receipts = [receipt for event in events if isinstance(event, Published) for receipt in event.receipts]
    assert len(receipts) == 3
    assert max(receipt.probe_difference for receipt in receipts) < 1e-3
    assert sum(isinstance(event, StepCommitted) for event in events) == 2
    exported = run.folder / "policy"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (model / name).read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (model, exported))
    assert before.keys() == after.keys()
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert moved > 0.9 * sum(tensor.numel() for tensor in before.values())
    said = answer(exported)
    assert "Paris" in said
    assert said_by_vllm(exported).strip() == said.removesuffix("<|im_end|>")


def said_by_vllm(folder: Path) -> str:
    """What vLLM says, which loads the folder by itself in a process of its own."""
    program = (
        "from vllm import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, dtype='float32', max_model_len=128, kv_cache_memory_bytes=64 << 20, "
        "enforce_eager=True)\n"
        f"(out,) = llm.chat([{QUESTION!r}], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)\n"
        "print('said:', out.outputs[0].text)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return out.rpartition("said:")[2]


async def test_grpo_trains_adapters_alone(model: Path):
    async with asyncflow.launch(recipe("grpo_lora.toml", VARIED, *ONE_SMALL_STEP)) as run:
        events = [event async for event in run.events()]
        ended = await run.wait()
    assert ended.outcome == "finished", ended.error
    published = [event for event in events if isinstance(event, Published)]
    assert max(event.nbytes for event in published) < 0.05 * (model / "model.safetensors").stat().st_size
    assert (run.folder / "policy" / "adapters" / "adapter_config.json").exists()
    assert "Paris" in answer(run.folder / "policy")


def test_fine_tuning_teaches_the_sentence_and_keeps_the_tokenizer(model: Path, tmp_path: Path):
    finetune(fine_tuning("sft.toml", tmp_path), CONSOLE)
    out = Path("runs/smollm2/sft")
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    before, after = (answer(folder, {"role": "user", "content": "What is 2 plus 5?"}) for folder in (model, out))
    assert not before.startswith("The answer is")
    assert after.startswith("The answer is")


def test_a_reward_model_is_trained_from_pairs(model: Path, tmp_path: Path):
    accuracy = train_reward(fine_tuning("reward.toml", tmp_path), CONSOLE)
    assert accuracy is not None
    assert 0.0 <= accuracy <= 1.0
    assert (Path("runs/smollm2/reward") / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
