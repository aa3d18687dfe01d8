"""Evaluation: greedy answers to held-out prompts, drawn by the run's own generator, judged by a rule.

The rule is no reward and its rows are no training rows: they carry ids of their own and are counted nowhere.
"""

from __future__ import annotations

import asyncio

from asyncflow.control.admission.prompts import PromptSource
from asyncflow.services.channels.endpoint import Requestable, ServiceError, Store, ask
from asyncflow.services.channels.shard_refs import ShardRef, pack, parts_of, unpack
from protocols.control.events import Evaluated
from protocols.control.requests import Invoke, Invoked
from protocols.data.messages import Scores
from protocols.roles import Sampling


class Evaluator:
    """Held-out prompts and the metric's name."""

    def __init__(self, source: PromptSource, store: Store, metric: str, max_tokens: int, limit: int) -> None:
        self._source, self._store, self._metric = source, store, metric
        self._sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        self._limit = limit

    async def run(self, generator: Requestable, judge: Requestable, version: int) -> Evaluated:
        """Mean of the metric over the held-out prompts, under weights at least as new as `version`."""
        prompts = self._source.evaluation(version, self._limit)
        asked = await asyncio.to_thread(pack, self._store, prompts, 0)
        drawn = await self._invoke(generator, "generate", [asked], self._sampling)
        judged = await self._invoke(judge, "score", drawn)
        scores = unpack([await self._store.get(part.payload) for part in judged], Scores)
        return Evaluated(step=version, metric=self._metric, value=float(scores.scores.mean()), samples=len(scores))

    async def _invoke(
        self, endpoint: Requestable, method: str, parts: list[ShardRef], sampling: Sampling | None = None
    ) -> list[ShardRef]:
        request = Invoke(method, [part.shard for part in parts], sampling)
        reply, payloads = await ask(endpoint, request, [part.payload for part in parts])
        assert isinstance(reply, Invoked)
        if reply.failures:
            first = reply.failures[0]
            raise ServiceError(
                f"evaluation: {len(reply.failures)} rows failed in {endpoint.name}.{method}, "
                f"the first ({first.sample_id}): {first.cause}"
            )
        return parts_of(reply.shards, payloads)
