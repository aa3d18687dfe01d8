"""Fired: the result of one firing of a stage, collected from the replies of its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from asyncflow.services.channels.endpoint import Payload
from asyncflow.services.channels.shard_refs import ShardRef, parts_of
from protocols.control.delivery import RankReply
from protocols.data.messages import Metrics
from protocols.layout.transfer import protocol
from protocols.stage import Failure


class Fired(msgspec.Struct):
    """The result of one firing."""

    parts: list[ShardRef] = []  # the outputs of the collected ranks, in the protocol's order
    failures: list[Failure] = []
    metrics: Metrics | None = None
    lost: list[int] = []  # samples whose bytes were lost
    generated_tokens: int = 0  # response tokens, if it generated


def collect(
    stage: str, samples: Sequence[int], replies: Iterable[tuple[Sequence[int], RankReply, list[Payload]]]
) -> Fired:
    """Put the replies of the collected ranks together, each with the samples of its call.

    Raises ValueError if a row did not leave exactly once.
    """
    fired, metrics = Fired(), []
    for mine, reply, payloads in replies:
        failures = [Failure(mine[row], d.cause) for d in reply.damaged for row in d.rows] + reply.failures
        one = Fired(parts_of(reply.shards, payloads), failures, lost=[mine[row] for row in reply.lost])
        if reply.metrics is not None:
            metrics.append(reply.metrics)
        else:
            check_complete(stage, mine, one)
        fired.parts += one.parts
        fired.failures += one.failures
        fired.lost += one.lost
        fired.generated_tokens += reply.generated_tokens
    if metrics:
        fired.metrics = protocol("METRIC").combine(metrics)
    else:  # a protocol could distribute too few rows, or collect from too few ranks
        check_complete(stage, samples, fired)
    return fired


def check_complete(stage: str, taken: Sequence[int], fired: Fired) -> None:
    """Check that each row leaves exactly once, as a value or a tombstone: a join would wait for a missing one for ever.

    Raises ValueError naming the stage and the first samples.
    """
    given = [sample for part in fired.parts for sample in part.shard.sample_ids]
    given += [failure.sample_id for failure in fired.failures] + fired.lost
    if sorted(given) != sorted(taken):
        wrong = sorted(set(given) ^ set(taken)) or sorted(s for s in set(given) if given.count(s) > 1)
        raise ValueError(f"{stage}: took {len(taken)} rows and gave {len(given)}; not once each: samples {wrong[:4]}")
