"""RuleScorer: scores responses by a rule, which runs in processes of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocols.control.code import CodeSource
from protocols.data.columns import take
from protocols.data.jagged import Jagged
from protocols.data.messages import Prompts, Rollouts
from protocols.stage import Failure
from workers.data.tokenizer import Tokenizer
from workers.rewards.arguments import RuleNeeds, RuleRow
from workers.rewards.sandbox_pool import RuleFailed, SandboxPool
from workers.rewards.scoring import ScoredRows, Scorer
from workers.settings import Failures
from workers.user_code import BadCode, NoSource, module_of, source_of


class RuleScorer(Scorer):
    """Gives a rule the texts of each row, and what else it asks for."""

    def __init__(self, rule: str, tokenizer_path: str, failures: Failures) -> None:
        self._tokenizer = Tokenizer(tokenizer_path)
        self._rule, self._failures = rule, failures
        try:
            self._pool = self._pool_of(source_of(module) if (module := module_of(rule)) else None)
        except NoSource:  # the rule's process imports it
            self._pool = self._pool_of(None)
        except BadCode as error:  # which fails each row
            self._pool = self._pool_of(None, str(error))
        self._next: SandboxPool | None = None  # runs the prepared rule until `switch_code`
        self._last: Rollouts | None = None  # the last row that got a score: a new rule is tried out on it

    @property
    def needs(self) -> RuleNeeds:
        """What the rule asks for. Starts its process; raises RuleFailed if it can't be loaded."""
        return self._pool.start()

    def score(self, rollouts: Rollouts) -> ScoredRows:
        """Score each row by itself. A row fails with its last cause once every attempt has failed."""
        return self._score(self._pool, rollouts)

    def prepare_code(self, sources: Sequence[CodeSource]) -> None:
        """Start a process of the new rule beside the running one; it has to score the last row that got a score."""
        self.switch_code(take=False)
        for source in sources:
            if source.module == module_of(self._rule):
                self._next = self._pool_of(source)
                try:
                    self._try(self._next)
                except RuleFailed as error:
                    self.switch_code(take=False)
                    raise BadCode(str(error)) from error

    def switch_code(self, take: bool) -> None:
        """See Scorer."""
        if self._next is not None:
            kept, gone = (self._next, self._pool) if take else (self._pool, self._next)
            self._pool, self._next = kept, None
            gone.close()

    def try_on(self, prompt: Prompts) -> list[str]:
        """Why the rule gives no score to a prompt's reference as response, then to an empty response; "" if it does."""
        reference = prompt.references.text(0)
        responses = [self._tokenizer.encode([reference])[0] if reference else [], []]
        tried = take(prompt, [0, 0])
        rows = Jagged.from_rows(responses, np.int32)
        zeros = np.zeros(len(rows.values))
        scored = self._score(
            self._pool,
            Rollouts(
                sample_ids=np.arange(2),
                prompts=tried.prompts,
                references=tried.references,
                responses=rows,
                log_probs=rows.with_values(zeros.astype(np.float32)),
                versions=rows.with_values(zeros.astype(np.int32)),
                loss_mask=rows.with_values(zeros.astype(np.uint8)),
                finishes=np.zeros(2, np.uint8),
                columns=tried.columns,
            ),
        )
        causes = {failure.sample_id: failure.cause for failure in scored.failures}
        return [causes.get(0, ""), causes.get(1, "")]

    def close(self) -> None:
        """End the rule's processes."""
        self.switch_code(take=False)
        self._pool.close()

    def _pool_of(self, source: CodeSource | None, unusable: str = "") -> SandboxPool:
        failures = self._failures
        return SandboxPool(
            self._rule,
            source,
            unusable=unusable,
            timeout_seconds=failures.reward_timeout_seconds,
            concurrency=failures.reward_concurrency,
            retries=failures.reward_retries,
            backoff_seconds=failures.reward_backoff_seconds,
            memory_bytes=failures.reward_memory_bytes,
            output_bytes=failures.reward_output_bytes,
        )

    def _try(self, pool: SandboxPool) -> None:
        """Raises RuleFailed if the rule can't be loaded, or gives the last row no score."""
        pool.start()
        if self._last is not None and (failures := self._score(pool, self._last).failures):
            raise RuleFailed(failures[0].cause)

    def _score(self, pool: SandboxPool, rollouts: Rollouts) -> ScoredRows:
        try:
            rows = self._rows(rollouts, pool.start())
        except RuleFailed as error:
            failures = [Failure(sample, str(error)) for sample in rollouts.sample_ids.tolist()]
            return ScoredRows(rollouts.sample_ids[:0], np.empty(0, np.float32), failures)
        answers = pool.score(rows)
        scored = [row for row, answer in enumerate(answers) if answer.score is not None]
        samples = rollouts.sample_ids
        failures = [
            Failure(sample, f"rule {self._rule} {answer.error}")
            for sample, answer in zip(samples.tolist(), answers, strict=True)
            if answer.score is None
        ]
        if scored:
            self._last = take(rollouts, scored[-1:])
        scores = np.array([answers[row].score for row in scored], np.float32)
        parts = [answers[row].parts for row in scored]
        return ScoredRows(samples[scored], scores, failures, parts if any(parts) else ())

    def _rows(self, rollouts: Rollouts, needs: RuleNeeds) -> list[RuleRow]:
        prompts, responses = ([ids.tolist() for ids in column] for column in (rollouts.prompts, rollouts.responses))
        count = len(rollouts)
        plain = [self._tokenizer.decode(ids) for ids in (prompts, responses)]
        raw = (
            [self._tokenizer.decode(ids, special=True) for ids in (prompts, responses)]
            if needs.raw
            else [[""] * count] * 2
        )
        return [
            RuleRow(
                prompt=plain[0][row],
                response=plain[1][row],
                reference=rollouts.references.text(row),
                raw_prompt=raw[0][row],
                raw_response=raw[1][row],
                prompt_ids=prompts[row] if needs.ids else [],
                response_ids=responses[row] if needs.ids else [],
                columns=rollouts.columns.text(row),
            )
            for row in range(count)
        ]
