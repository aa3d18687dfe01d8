"""The outputs of a micro-batch: the activations of the last layer, and the head that reads them where they are wanted.

Logits are the largest tensor of a forward pass: [tokens, vocabulary], more than a gigabyte for 2,048 tokens and a
vocabulary of 150,000 in float32. So the head reads only the positions before response tokens, and of these a chunk at
a time; the backward pass computes a chunk's logits again. Never more than a chunk's logits and their gradients exist.
Each token's values are those of the whole computation, and gradients are equal to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.training.micro_batches import MicroBatch

CHUNK_BYTES = 256 * 1024 * 1024  # of a chunk's logits in float32, where the settings say nothing

Head = Callable[[Tensor], Tensor]  # activations [m, H] -> logits [m, V], or values or scores [m, 1]
# Logits [m, V] before some response tokens, these tokens [m] and their places in their responses [m] -> values [m] each
ReadLogits = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
ReadOutputs = Callable[["Outputs"], Tensor]
_Compute = Callable[[Tensor, slice], tuple[Tensor, ...]]  # activations of some tokens, and which these are


def _identity(states: Tensor) -> Tensor:
    return states


def chunk_of(tokens: int, vocabulary: int) -> int:
    """`tokens`, or for 0 the number of tokens whose logits in float32 are CHUNK_BYTES."""
    return tokens or max(1, CHUNK_BYTES // (4 * vocabulary))


class Outputs:
    """What the last stage gives to a loss: read it as a whole, at some positions, or per response token."""

    def __init__(
        self, states: Tensor, head: Head = _identity, parameters: Sequence[nn.Parameter] = (), chunk: int = 0
    ) -> None:
        """`states` [n, L, H]; `parameters` are those that the head reads, `chunk` tokens of it at a time; 0: all."""
        self._states, self._head, self._chunk = states, head, chunk
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]

    def whole(self) -> Tensor:
        """The outputs at all positions, [n, L, V or 1]."""
        return self._head(self._states)

    def before_response(self, batch: MicroBatch) -> Tensor:
        """The outputs at the position before each response token, row by row, [sum of T_i, V or 1]."""
        return batch.before_response(self.whole())

    def at_end(self, batch: MicroBatch) -> Tensor:
        """The outputs at the last token of each row, [n, V or 1]."""
        return batch.at_end(self.whole())

    def of_responses(self, batch: MicroBatch, read: ReadLogits) -> tuple[Tensor, ...]:
        """`read` of all response tokens, row by row, [sum of T_i] each; it sees at most a chunk of them at once."""
        states, tokens, places = batch.before_response(self._states), batch.response_tokens(), batch.response_indices()

        def compute(some: Tensor, rows: slice) -> tuple[Tensor, ...]:
            return read(self._head(some), tokens[rows], places[rows])

        if not self._chunk or len(states) <= self._chunk:
            return compute(states, slice(None))
        if not torch.is_grad_enabled() or not (states.requires_grad or self._parameters):
            return _by_chunks(compute, states, self._chunk)
        return _Recomputed.apply(compute, self._chunk, states, *self._parameters)  # pyright: ignore[reportReturnType]


def _by_chunks(compute: _Compute, states: Tensor, chunk: int) -> tuple[Tensor, ...]:
    parts = [compute(states[rows], rows) for rows in _chunks(len(states), chunk)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


class _Recomputed(torch.autograd.Function):
    """`_by_chunks`, whose backward pass computes each chunk again.

    torch's `checkpoint` around each chunk would do, but for a head in bfloat16 it would sum the chunks' gradients in
    bfloat16. Here they are summed in float32 and rounded once, as by one product over all tokens.
    """

    @staticmethod
    def forward(ctx: Any, compute: _Compute, chunk: int, states: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.compute, ctx.chunk = compute, chunk
        ctx.save_for_backward(states, *parameters)
        return _by_chunks(compute, states, chunk)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, *parameters = ctx.saved_tensors
        of_states = torch.empty_like(states) if ctx.needs_input_grad[2] else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for rows in _chunks(len(states), ctx.chunk):
            with torch.enable_grad():
                some = states[rows].detach().requires_grad_()
                outputs = ctx.compute(some, rows)
            own = [gradient[rows] for gradient in gradients]
            found = torch.autograd.grad(outputs, [some, *parameters], own, allow_unused=True)
            del outputs
            if of_states is not None and found[0] is not None:
                of_states[rows] = found[0]
            for total, part in zip(sums, found[1:], strict=True):
                if part is not None:
                    total.add_(part)
        of_parameters = [total.to(parameter.dtype) for total, parameter in zip(sums, parameters, strict=True)]
        return None, None, of_states, *of_parameters
