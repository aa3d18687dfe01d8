"""Preference pairs of simulated labellers, who compare answers of the fine-tuned policy.

Most pairs compare an answer of the policy with the right one. Some compare two answers of the policy, so that the
reward model learns that half right is better than all wrong. Some have mistakes that the policy does not make yet but
may discover in training: PPO would exploit a reward model that never saw those.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.demo.task import MAX_TOKENS, preference, write_rows
from protocols.data.ids import place_of, prompt_id, prompt_of
from protocols.data.messages import Finish
from protocols.roles import Sampling
from protocols.weights import Version
from workers.data.datasets import Preference, Problem, read_rows
from workers.data.tokenizer import Tokenizer
from workers.data.vocabulary import Vocabulary
from workers.generation.engine import FinishedRow
from workers.generation.torch import TorchEngine
from workers.settings import Generation
from workers.training.models import load_causal

GRADED, IMAGINED = 0.2, 0.4  # shares of problems; the others compare the policy's answer with the right one


class PolicyAnswer(msgspec.Struct, frozen=True):
    """An answer of the policy."""

    text: str
    truncated: bool  # cut off by the token limit

    def quality(self, reference: str) -> int:
        """Letters in the right place, less the missing and surplus letters, less 1 if truncated."""
        right = sum(a == b for a, b in zip(self.text, reference, strict=False))
        return right - abs(len(self.text) - len(reference)) - self.truncated


def write_comparisons(policy: Path, data: Path, name: str, seed: int) -> None:
    """Read the problems of `data/{name}.jsonl` and write their preference pairs as `data/{name}_pairs.jsonl`."""
    problems = read_rows(data / f"{name}.jsonl", Problem)
    rng = random.Random(seed)
    wanted = [_answers_wanted(rng.random()) for _ in problems]
    answers = _sample_answers(policy, problems, wanted, seed)
    pairs = (_compare(problem, given, rng) for problem, given in zip(problems, answers, strict=True))
    write_rows(data / f"{name}_pairs.jsonl", (pair for pair in pairs if pair is not None))


def _answers_wanted(uniform: float) -> int:
    """The number of the policy's answers in a problem's pair: 2, 0 for an imagined mistake, or 1."""
    return 2 if uniform < GRADED else 0 if uniform < GRADED + IMAGINED else 1


def _compare(problem: Problem, answers: list[PolicyAnswer], rng: random.Random) -> Preference | None:
    """The pair of one problem; None if both answers are equally good."""
    if not answers:
        return preference(problem, rng)
    pair = [*answers, PolicyAnswer(problem.reference, truncated=False)][:2]
    better, worse = sorted(pair, key=lambda answer: answer.quality(problem.reference), reverse=True)
    if better.quality(problem.reference) == worse.quality(problem.reference):
        return None
    return Preference(problem.prompt, better.text, worse.text, better.truncated, worse.truncated)


def _sample_answers(policy: Path, problems: list[Problem], wanted: list[int], seed: int) -> list[list[PolicyAnswer]]:
    """Sample the wanted number of the policy's answers to each problem, at temperature 1."""
    source = PromptSource([DataRow(p.prompt, p.reference) for p in problems], str(policy), seed)
    settings = Generation(engine="torch", slots=512)
    engine = TorchEngine(load_causal(policy), settings, seed, Vocabulary.of(policy), version=Version(0, 0))
    for count in sorted(set(wanted) - {0}):
        ids = [prompt_id(0, row) for row, number in enumerate(wanted) if number == count]
        engine.submit(source.requests(ids, count, min_version=0), Sampling(max_tokens=MAX_TOKENS, temperature=1.0))
    rows: list[FinishedRow] = []
    while engine.unfinished:
        rows += engine.step()
    texts = Tokenizer(policy).decode(row.tokens for row in rows)
    answers: list[list[PolicyAnswer]] = [[] for _ in problems]
    for row, text in zip(rows, texts, strict=True):
        answers[place_of(prompt_of(row.sample_id))[1]].append(PolicyAnswer(text, row.finish is not Finish.STOP))
    return answers
