"""Evaluation: greedy answers to held-out prompts, drawn by the run's own generator, judged by a rule.

The rule is no reward and its rows are no training rows: they carry ids of their own and are counted nowhere.
"""

from __future__ import annotations

from asyncflow.control.prompts import PromptSource
from asyncflow.services.endpoint import Endpoint, ServiceError, Store, ask
from protocols import codec
from protocols.control import Evaluated, Invoke, Invoked
from protocols.messages import Scores
from protocols.roles import Sampling


class Evaluator:
    """Held-out prompts and the metric's name."""

    def __init__(self, source: PromptSource, store: Store, metric: str, max_tokens: int, limit: int) -> None:
        self._source, self._store, self._metric = source, store, metric
        self._sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        self._limit = limit

    async def run(self, generator: Endpoint, judge: Endpoint, version: int) -> Evaluated:
        """Mean of the metric over the held-out prompts, under weights at least as new as `version`."""
        prompts = self._source.evaluation(version, self._limit)
        payload = self._store.put(codec.encode(prompts))
        drawn = await self._invoke(generator, Invoke("generate", self._sampling), payload)
        scores = codec.decode(await self._store.get(await self._invoke(judge, Invoke("score"), drawn)))
        assert isinstance(scores, Scores)
        return Evaluated(step=version, metric=self._metric, value=float(scores.scores.mean()), samples=len(scores))

    async def _invoke(self, endpoint: Endpoint, request: Invoke, payload: object) -> object:
        reply, answer = await ask(endpoint, request, payload)
        assert isinstance(reply, Invoked)
        if reply.failures:
            first = reply.failures[0]
            raise ServiceError(
                f"evaluation: {len(reply.failures)} rows failed in {endpoint.name}.{request.method}, "
                f"the first ({first.sample_id}): {first.cause}"
            )
        return answer
