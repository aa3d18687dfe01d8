"""Splits a step's batch into mini-batches, one for each optimizer step, in the same way on every replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from protocols.data.columns import B, Batch, take
from workers.settings import Loss


def mini_batches(batch: B, settings: Loss, seed: int) -> Iterator[B]:
    """The mini-batches of all epochs of a step.

    One mini-batch is the batch in its order; several are cut from a permutation that (seed, epoch) decides.
    """
    for epoch in range(settings.epochs):
        if settings.mini_batches == 1:
            yield batch
            continue
        order = np.random.default_rng([seed, epoch]).permutation(len(batch))
        for rows in np.array_split(order, settings.mini_batches):
            if len(rows):
                yield take(batch, rows)


def replica_mini_batches(batch: B, rows: Sequence[int], replica: int, loss: Loss, seed: int) -> Iterator[B]:
    """A replica's part, perhaps empty, of each mini-batch of a step that `mini_batches` cuts from all rows.

    `batch` are the rows of `replica`; `rows` says how many each replica has, in the order of the whole batch.
    """
    first = sum(rows[:replica])
    for mini_batch in mini_batches(Batch(sample_ids=np.arange(sum(rows))), loss, seed):
        own = mini_batch.sample_ids - first
        yield take(batch, own[(own >= 0) & (own < len(batch))])


def named_rows(batch: Batch) -> str:
    """How an error names a batch: its first ids and their number."""
    ids = batch.sample_ids
    return f"batch of {len(ids)} samples ({', '.join(map(str, ids[:4].tolist()))}{', ...' if len(ids) > 4 else ''})"
