"""Preference pairs as labellers give them: they see what the fine-tuned policy answers, and choose.

Most pairs set an answer of the policy beside the right one; some compare two answers of the policy, so that the
reward model learns that half right is better than all wrong; some show mistakes that the policy does not make yet
but that training may discover. A reward model that never saw those is the first thing that PPO exploits.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from asyncflow.control.admission.prompts import DataRow, PromptSource
from asyncflow.demo.task import MAX_TOKENS, preference, write_rows
from protocols.data.ids import place_of, prompt_id, prompt_of
from protocols.data.messages import Finish
from protocols.roles import Sampling
from protocols.weights import Version
from workers.data.datasets import Preference, Problem, read_rows
from workers.data.hf_folder import end_of_sequence
from workers.generation.engine import FinishedRow
from workers.generation.torch import TorchEngine
from workers.settings import Generation
from workers.training.models import load_causal

GRADED, IMAGINED = 0.2, 0.4  # shares of problems; the rest sets the policy's answer beside the right one


class Answer(msgspec.Struct, frozen=True):
    """What a policy wrote."""

    text: str
    truncated: bool  # it ran into the token limit, so it has no end

    def quality(self, reference: str) -> int:
        """Letters in the right place, less what is missing, too much, or not ended."""
        right = sum(a == b for a, b in zip(self.text, reference, strict=False))
        return right - abs(len(self.text) - len(reference)) - self.truncated


def write_comparisons(policy: Path, data: Path, name: str, seed: int) -> None:
    """Read the problems of `data/{name}.jsonl` and write what labellers say of them as `data/{name}_pairs.jsonl`."""
    problems = read_rows(data / f"{name}.jsonl", Problem)
    rng = random.Random(seed)
    wanted = [_answers_wanted(rng.random()) for _ in problems]
    answers = _draw(policy, problems, wanted, seed)
    pairs = (_compare(problem, given, rng) for problem, given in zip(problems, answers, strict=True))
    write_rows(data / f"{name}_pairs.jsonl", (pair for pair in pairs if pair is not None))


def _answers_wanted(draw: float) -> int:
    """How many answers of the policy a problem's pair shows: 2, 0 for an imagined mistake, or 1."""
    return 2 if draw < GRADED else 0 if draw < GRADED + IMAGINED else 1


def _compare(problem: Problem, answers: list[Answer], rng: random.Random) -> Preference | None:
    """The pair of one problem, or None where there is nothing to choose."""
    if not answers:
        return preference(problem, rng)
    pair = [*answers, Answer(problem.reference, truncated=False)][:2]
    better, worse = sorted(pair, key=lambda answer: answer.quality(problem.reference), reverse=True)
    if better.quality(problem.reference) == worse.quality(problem.reference):
        return None
    return Preference(problem.prompt, better.text, worse.text, better.truncated, worse.truncated)


def _draw(policy: Path, problems: list[Problem], wanted: list[int], seed: int) -> list[list[Answer]]:
    """For each problem the wanted number of answers of the policy, at temperature 1."""
    source = PromptSource([DataRow(p.prompt, p.reference) for p in problems], str(policy), seed)
    settings = Generation(engine="torch", slots=512)
    engine = TorchEngine(load_causal(policy), settings, seed, end_of_sequence(policy), version=Version(0, 0))
    for count in sorted(set(wanted) - {0}):
        ids = [prompt_id(0, row) for row, number in enumerate(wanted) if number == count]
        engine.submit(source.requests(ids, count, min_version=0), Sampling(max_tokens=MAX_TOKENS, temperature=1.0))
    rows: list[FinishedRow] = []
    while engine.unfinished:
        rows += engine.step()
    texts = Tokenizer.from_file(str(policy / "tokenizer.json")).decode_batch([r.tokens.tolist() for r in rows])
    answers: list[list[Answer]] = [[] for _ in problems]
    for row, text in zip(rows, texts, strict=True):
        answers[place_of(prompt_of(row.sample_id))[1]].append(Answer(text, row.finish is not Finish.STOP))
    return answers
