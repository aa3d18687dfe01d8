"""GRPO by TRL's GRPOTrainer, for `trl_grpo`. It runs in an environment of its own, without asyncflow.

`python trl_peer.py train SETTINGS` trains and prints its seconds; `python trl_peer.py score SETTINGS` scores the greedy
answers of model folders; `python trl_peer.py losses SETTINGS` prints values and gradients of its losses. SETTINGS is a
JSON object, and so is the last line that is printed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]


def rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def exact_match(completions: list[str], reference: list[str], **_: Any) -> list[float]:
    return [float(given.strip() == wanted.strip()) for given, wanted in zip(completions, reference, strict=True)]


class TimedTrainer(GRPOTrainer):
    """Counts the seconds of generation."""

    generation_seconds = 0.0

    def _generate(self, *given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return super()._generate(*given, **named)
        finally:
            self.generation_seconds += time.perf_counter() - started


def train(settings: dict[str, Any]) -> dict[str, float]:
    """Train with the recipe's numbers of steps, samples and mini-batches.

    Optimizer and schedule are passed to the trainer, so that they are exactly the same on both sides.
    """
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    samples = settings["prompts_per_step"] * settings["samples_per_prompt"]
    updates = settings["steps"] * settings["mini_batches"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["epsilon"],
        weight_decay=settings["weight_decay"],
    )

    def share(done: int) -> float:
        warm, decay = settings["warmup_steps"], settings["decay_steps"]
        return min(1.0, (done + 1) / warm if warm else 1.0) * (max(0.0, 1.0 - done / decay) if decay else 1.0)

    trainer = TimedTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=exact_match,
        train_dataset=Dataset.from_list(rows(settings["train"])),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)),
        args=GRPOConfig(
            output_dir=settings["output"],
            max_steps=updates,
            per_device_train_batch_size=samples // settings["mini_batches"],
            gradient_accumulation_steps=1,
            steps_per_generation=settings["mini_batches"],
            num_generations=settings["samples_per_prompt"],
            max_completion_length=settings["max_tokens"],
            temperature=settings["temperature"],
            beta=settings["kl_coefficient"],
            use_bias_correction_kl=False,
            epsilon=settings["clip"],
            loss_type="grpo",
            scale_rewards="group",
            max_grad_norm=settings["gradient_clip"],
            seed=settings["seed"],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(settings["output"])
    tokenizer.save_pretrained(settings["output"])
    return {"seconds": seconds, "generation_seconds": trainer.generation_seconds}


def losses(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The value and the gradient of each loss, on the given log-probs. An item of `losses` is a trainer's arguments."""
    lengths = [len(row) for row in settings["log_probs"]]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def padded(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([row + [0.0] * (max(lengths) - len(row)) for row in rows], dtype=torch.float64)

    columns = {name: padded(settings[name]) for name in ("log_probs", "old", "reference")}
    found = {}
    for name, arguments in settings["losses"].items():
        trainer = GRPOTrainer(
            model=settings["model"],
            reward_funcs=exact_match,
            train_dataset=Dataset.from_list([{"prompt": "A:1+1=", "reference": "2"}]),
            args=GRPOConfig(
                output_dir=settings["output"],
                per_device_train_batch_size=2,
                num_generations=2,
                use_cpu=True,
                bf16=False,
                report_to="none",
                use_bias_correction_kl=False,
                **arguments,
            ),
        )
        trainer.model.eval()
        log_probs = columns["log_probs"].clone().requires_grad_()
        given = (log_probs, torch.zeros_like(log_probs), None)  # in the place of a model's forward
        trainer._get_per_token_logps_and_entropies = lambda *_, given=given, **__: given
        value = trainer._compute_loss(
            None,
            {
                "prompt_ids": torch.zeros(len(lengths), 1, dtype=torch.int64),
                "prompt_mask": torch.ones(len(lengths), 1, dtype=torch.int64),
                "completion_ids": torch.zeros(mask.shape, dtype=torch.int64),
                "completion_mask": mask.long(),
                "advantages": torch.tensor(settings["advantages"], dtype=torch.float64),
                "old_per_token_logps": columns["old"],
                "ref_per_token_logps": columns["reference"],
                "num_items_in_batch": mask.sum(),
            },
        )
        (gradient,) = torch.autograd.grad(value, [log_probs])
        found[name] = {"value": value.item(), "gradient": gradient[mask].tolist()}
    return found


@torch.no_grad()
def score(settings: dict[str, Any]) -> dict[str, float]:
    """The share of the held-out problems that each model of `models` solves with greedy answers."""
    heldout = rows(settings["heldout"])
    found = {}
    for name, folder in settings["models"].items():
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = tokenizer([row["prompt"] for row in heldout], return_tensors="pt", padding=True)
        sequences = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=settings["max_tokens"],
            do_sample=False,
        )
        texts = tokenizer.batch_decode(sequences[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        found[name] = sum(exact_match(texts, [row["reference"] for row in heldout])) / len(heldout)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"train": train, "score": score, "losses": losses}[sys.argv[1]](json.loads(sys.argv[2]))))
