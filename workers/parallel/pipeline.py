"""Runs a stage's schedule: sends activations to the next stage, and gradients to the one before.

torch.distributed.pipelining does not fit: it fixes one shape for all micro-batches, while ours are cut by a budget of
tokens and differ in shape; and its 1F1B refuses fewer micro-batches than stages. All ranks of a replica hold the same
rows, so sender and receiver know the shape of every message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from workers.parallel.decoder import DecoderShard
from workers.parallel.groups import RankGroup
from workers.parallel.schedule import Backward, Forward, Message, Transfer, forward_schedule, train_schedule
from workers.parallel.whole_module import WholeModule
from workers.training.micro_batches import MicroBatch
from workers.training.outputs import Outputs

OfOutputs = Callable[[int, Outputs], Tensor]  # a micro-batch's number and the last stage's outputs of it


class Pipeline:
    """One stage, and the group of the ranks with its tensor index in all stages of its replica."""

    def __init__(
        self, shard: DecoderShard | WholeModule, group: RankGroup, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shard = shard
        self._group = group
        self._dtype = dtype
        self._device = device
        self._in: dict[tuple[str, int], Tensor] = {}  # what arrived and what leaves next, by kind and micro-batch
        self._out: dict[tuple[str, int], Tensor] = {}
        # NCCL wants every rank of a group in its first operation; a transfer has only two of them.
        group.sum_(torch.zeros(1, device=device))

    def train(self, batches: Sequence[MicroBatch], loss: OfOutputs, after_backward: Callable[[], None]) -> float:
        """Forward and backward of all micro-batches, 1F1B; gradients add up in the parameters.

        `after_backward` follows each micro-batch's backward. Returns the sum of the losses on the last stage, 0 on the
        others.
        """
        inputs: dict[int, Tensor | None] = {}
        outputs: dict[int, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for operation in train_schedule(self._group.index, self._group.size, len(batches)):
            match operation:
                case Transfer():
                    self._exchange(operation, batches)
                case Forward(micro):
                    inputs[micro] = hidden = self._in.pop(("activation", micro), None)
                    outputs[micro] = self._forward(batches[micro], hidden, micro, loss)
                    if self._shard.is_last:
                        total += outputs[micro].detach()
                case Backward(micro):
                    outputs.pop(micro).backward(self._in.pop(("gradient", micro), None))
                    hidden = inputs.pop(micro)
                    if hidden is not None and hidden.grad is not None:
                        self._out["gradient", micro] = hidden.grad
                    after_backward()
        return float(total)

    @torch.no_grad()
    def forward(self, batches: Sequence[MicroBatch], read: OfOutputs) -> list[Tensor]:
        """Forward of all micro-batches without gradients: `read` of each on the last stage, an empty list on others."""
        kept: list[Tensor] = []
        for operation in forward_schedule(self._group.index, self._group.size, len(batches)):
            match operation:
                case Transfer():
                    self._exchange(operation, batches)
                case Forward(micro):
                    output = self._forward(batches[micro], self._in.pop(("activation", micro), None), micro, read)
                    if self._shard.is_last:
                        kept.append(output)
        return kept

    def _forward(self, batch: MicroBatch, hidden: Tensor | None, micro: int, read: OfOutputs) -> Tensor:
        """Activations for the next stage; on the last stage `read` of the outputs."""
        if hidden is not None and torch.is_grad_enabled():
            hidden.requires_grad_()
        mask = batch.mask if self._shard.reads_mask else None
        output = self._shard(batch.tokens, mask, hidden, read=lambda outputs: read(micro, outputs))
        if not self._shard.is_last:
            self._out["activation", micro] = output.detach()
        return output

    def _exchange(self, transfer: Transfer, batches: Sequence[MicroBatch]) -> None:
        assert isinstance(self._shard, DecoderShard), "a whole module has no neighbours"
        operations = []
        for message in transfer.sends:
            tensor = self._out.pop((message.what, message.micro)).contiguous()
            operations.append(self._operation(dist.isend, tensor, message))
        for message in transfer.receives:
            shape = (*batches[message.micro].tokens.shape, self._shard.plan.decoder.hidden)
            tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._in[message.what, message.micro] = tensor
            operations.append(self._operation(dist.irecv, tensor, message))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _operation(self, kind: Callable[..., dist.Work | None], tensor: Tensor, message: Message) -> dist.P2POp:
        return dist.P2POp(kind, tensor, self._group.ranks[message.peer], self._group.process_group)
