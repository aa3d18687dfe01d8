"""What our path is measured against: today's, and Ray's own floor.

The stand-ins for today are a padded torch batch that is pickled to every rank and sliced there, and one that the
caller cuts into a chunk a rank. Their columns, types and padding are those that synchronous systems carry for a
log-prob call: 64-bit token ids, masks and positions. `narrow` keeps only what our own message holds, in its types:
what remains then is the path. The floor is a front and ranks that pass the same bytes on and do nothing with them.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import ray
import torch

from asyncflow.services.channels.endpoint import Frame
from protocols.data.messages import Rollouts

Tensors = dict[str, torch.Tensor]


class RivalRank:
    """A rank of today: it fetches what it is told of and keeps its rows."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks

    def slice_of(self, holder: list[Any]) -> torch.Tensor:
        """Fetch the whole batch; the log-probs of the rank's own rows, as fresh memory."""
        batch: Tensors = ray.get(holder[0])
        mine = {name: column.chunk(self._ranks)[self._rank] for name, column in batch.items()}
        return mine["rollout_log_probs"].clone()

    def all_of(self, holder: list[Any]) -> torch.Tensor:
        """Fetch a chunk that holds its rows alone; their log-probs, as fresh memory."""
        batch: Tensors = ray.get(holder[0])
        return batch["rollout_log_probs"].clone()


class Rival:
    """Today's two paths over so many ranks."""

    def __init__(self, ranks: int) -> None:
        kind: Any = ray.remote(RivalRank)
        self._ranks = [kind.options(num_cpus=0).remote(rank, ranks) for rank in range(ranks)]

    async def fetch_all(self, batch: Tensors) -> torch.Tensor:
        """The whole batch put once and fetched by every rank; every row's log-probs back."""
        holder = [ray.put(batch)]
        parts = [rank.slice_of.remote(holder) for rank in self._ranks]
        return torch.cat([await part for part in parts])

    async def fetch_chunk(self, batch: Tensors) -> torch.Tensor:
        """The caller cuts the batch and puts a chunk a rank: none fetches more, and the caller carries all."""
        cuts = {name: column.chunk(len(self._ranks)) for name, column in batch.items()}
        # Cloned, for a view would be pickled with all of its batch.
        chunks = [{name: cut[rank].clone() for name, cut in cuts.items()} for rank in range(len(self._ranks))]
        parts = [rank.all_of.remote([ray.put(own)]) for rank, own in zip(self._ranks, chunks, strict=True)]
        return torch.cat([await part for part in parts])

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            ray.kill(rank)


class BareRank:
    """Fetches what it is told of and gives a few of its bytes back."""

    def pass_on(self, holder: list[Any], nbytes: int) -> bytes:
        """The first bytes of a frame."""
        frame: Frame = ray.get(holder[0])
        return frame[:nbytes].tobytes()


class BareFront:
    """An async actor that asks its ranks."""

    def __init__(self, ranks: list[Any]) -> None:
        self._ranks = ranks

    async def pass_on(self, payload: Any, nbytes: int) -> list[bytes]:
        """Every rank's answer; without ranks its own."""
        if not self._ranks:
            return [payload[:nbytes]]
        return await asyncio.gather(*(rank.pass_on.remote(payload, nbytes) for rank in self._ranks))


class Floor:
    """Ray's own time for a hop: a message in, all of its bytes to each rank (inline to a single one), a quarter out."""

    def __init__(self, ranks: int) -> None:
        rank: Any = ray.remote(BareRank)
        front: Any = ray.remote(BareFront)
        self._ranks = [rank.options(num_cpus=0).remote() for _ in range(ranks if ranks > 1 else 0)]
        self._front = front.options(num_cpus=0, max_concurrency=1000).remote(self._ranks)

    async def hop(self, frame: Frame) -> list[bytes]:
        """There and back."""
        payload: Any = [ray.put(frame)] if self._ranks else frame.tobytes()
        return await self._front.pass_on.remote(payload, frame.nbytes // 4 // max(1, len(self._ranks)))

    def close(self) -> None:
        """End the actors."""
        for actor in (self._front, *self._ranks):
            ray.kill(actor)


def padded(rollouts: Rollouts, *, narrow: bool = False) -> Tensors:
    """A message of equal rows as today's systems would carry it."""
    prompts = _matrix(rollouts.prompts.values, len(rollouts))
    responses = _matrix(rollouts.responses.values, len(rollouts))
    log_probs = _matrix(rollouts.log_probs.values, len(rollouts))
    if narrow:
        return {
            "prompts": prompts,
            "responses": responses,
            "versions": _matrix(rollouts.versions.values, len(rollouts)),
            "response_mask": _matrix(rollouts.loss_mask.values, len(rollouts)),
            "rollout_log_probs": log_probs,
        }
    tokens = torch.cat([prompts, responses], dim=1).long()
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(tokens.shape[1]).expand(len(tokens), -1).contiguous(),
        "prompts": prompts.long(),
        "responses": responses.long(),
        "response_mask": torch.ones(responses.shape, dtype=torch.int64),
        "rollout_log_probs": log_probs,
    }


def nbytes(batch: Tensors) -> int:
    """Bytes of its tensors."""
    return sum(column.nbytes for column in batch.values())


def _matrix(values: np.ndarray, rows: int) -> torch.Tensor:
    return torch.from_numpy(values.reshape(rows, -1).copy())
