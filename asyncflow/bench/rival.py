"""The baselines of the channels benchmark: padded batches as synchronous systems send them, and bare Ray actors.

A padded torch batch is pickled to every rank and sliced there, or the caller cuts it into one chunk a rank. Its
columns, types and padding are those that synchronous systems carry for a log-prob call: 64-bit token ids, masks and
positions. `narrow` keeps only the columns of our own message, in its types, so that only the path differs. The bare
actors are a coordinator and ranks that pass the same bytes on and do nothing else.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
import torch

from asyncflow.services.channels.endpoint import Frame
from protocols.data.messages import Rollouts

Tensors = dict[str, torch.Tensor]


class PaddedRank:
    """A rank that fetches a padded batch and keeps its own rows."""

    def log_probs(self, holder: list[Any], chunk: int, chunks: int) -> torch.Tensor:
        """Fetch a batch, cut it into `chunks` parts, and return a copy of the log-probs of part `chunk`."""
        batch: Tensors = ray.get(holder[0])
        own = {name: column.chunk(chunks)[chunk] for name, column in batch.items()}
        return own["rollout_log_probs"].clone()


class PaddedRival:
    """Both ways to send a padded batch to some ranks."""

    def __init__(self, ranks: int) -> None:
        kind: Any = ray.remote(PaddedRank)
        self._ranks = [kind.options(num_cpus=0).remote() for _ in range(ranks)]

    async def send_whole(self, batch: Tensors) -> torch.Tensor:
        """Put the whole batch once, let every rank fetch it, and return every row's log-probs."""
        holder, ranks = [ray.put(batch)], self._ranks
        parts = [rank.log_probs.remote(holder, number, len(ranks)) for number, rank in enumerate(ranks)]
        return torch.cat([await part for part in parts])

    async def send_chunks(self, batch: Tensors) -> torch.Tensor:
        """Cut the batch in the caller and put one chunk a rank, so that no rank fetches other rows."""
        cuts = {name: column.chunk(len(self._ranks)) for name, column in batch.items()}
        # A view would be pickled with the whole batch, so the chunks are clones.
        chunks = [{name: cut[rank].clone() for name, cut in cuts.items()} for rank in range(len(self._ranks))]
        parts = [rank.log_probs.remote([ray.put(own)], 0, 1) for rank, own in zip(self._ranks, chunks, strict=True)]
        return torch.cat([await part for part in parts])

    def close(self) -> None:
        """Kill the ranks."""
        for rank in self._ranks:
            ray.kill(rank)


class BareRank:
    """Fetches a frame and returns a few of its bytes."""

    def pass_on(self, holder: list[Any], nbytes: int) -> bytes:
        """The first bytes of a frame."""
        frame: Frame = ray.get(holder[0])
        return frame[:nbytes].tobytes()


class BareCoordinator:
    """An async actor that forwards a frame to its ranks."""

    def __init__(self, ranks: list[Any]) -> None:
        self._ranks = ranks

    async def pass_on(self, payload: Any, nbytes: int) -> list[bytes]:
        """Every rank's answer; without ranks, its own."""
        if not self._ranks:
            return [payload[:nbytes]]
        return await asyncio.gather(*(rank.pass_on.remote(payload, nbytes) for rank in self._ranks))


class BareRay:
    """Ray's own time for a hop: a message to each rank (inline to a single one), a quarter of its bytes back."""

    def __init__(self, ranks: int) -> None:
        rank: Any = ray.remote(BareRank)
        coordinator: Any = ray.remote(BareCoordinator)
        self._ranks = [rank.options(num_cpus=0).remote() for _ in range(ranks if ranks > 1 else 0)]
        self._coordinator = coordinator.options(num_cpus=0, max_concurrency=1000).remote(self._ranks)

    async def hop(self, frame: Frame) -> list[bytes]:
        """Send the frame and wait for the answers."""
        payload: Any = [ray.put(frame)] if self._ranks else frame.tobytes()
        return await self._coordinator.pass_on.remote(payload, frame.nbytes // 4 // max(1, len(self._ranks)))

    def close(self) -> None:
        """Kill the actors."""
        for actor in (self._coordinator, *self._ranks):
            ray.kill(actor)


def padded(rollouts: Rollouts, *, narrow: bool = False) -> Tensors:
    """A message of rows of equal length, as synchronous systems carry it."""
    columns = {
        "prompts": rollouts.prompts,
        "responses": rollouts.responses,
        "versions": rollouts.versions,
        "response_mask": rollouts.loss_mask,
        "rollout_log_probs": rollouts.log_probs,
    }
    batch = {name: torch.from_numpy(c.values.reshape(len(rollouts), -1).copy()) for name, c in columns.items()}
    if narrow:
        return batch
    prompts, responses = batch["prompts"].long(), batch["responses"].long()
    tokens = torch.cat([prompts, responses], dim=1)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(tokens.shape[1]).expand(len(tokens), -1).contiguous(),
        "prompts": prompts,
        "responses": responses,
        "response_mask": torch.ones_like(responses),
        "rollout_log_probs": batch["rollout_log_probs"],
    }


def nbytes(batch: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(column.nbytes for column in batch.values())
