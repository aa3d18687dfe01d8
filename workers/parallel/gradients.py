"""The gradients of a rank's parameters, summed over the micro-batches of a batch, and the precision of what is stepped.

A parameter in bfloat16 has 8 bits of mantissa: an update below 1/512 of its value rounds to nothing, and so does a
micro-batch's gradient beside a large enough sum of others. So forward and backward passes compute in bfloat16, while
gradients are summed, and weights stepped, in float32 (Micikevicius et al. 2018, "Mixed precision training").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from workers.parallel.decoder import unflat
from workers.parallel.groups import RankGroup
from workers.parallel.plan import Parameter


def stepped_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients are summed and weights stepped, for parameters that compute in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class GradientSums:
    """A gradient for each parameter, in its `stepped_dtype`: in its `grad`, or beside it if it computes in less.

    Until the first `attach`, gradients stay where the backward pass puts them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], specs: Mapping[str, Parameter], *, joined: bool) -> None:
        """`joined`: the gradients are views of `buffers`, one for each dtype, so that one collective sums them all."""
        self.buffers: list[Tensor] = []
        self._parameters, self._specs, self._joined = parameters, specs, joined
        self._beside: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if parameter.dtype != stepped_dtype(parameter.dtype):
                parameter.register_post_accumulate_grad_hook(partial(self._add, name))

    def attach(self) -> None:
        """Give each parameter a gradient of 0.

        So a parameter that the loss does not reach has a gradient of 0 on every backend, and AdamW steps it.
        """
        if not self._joined:
            for name, parameter in self._parameters.items():
                self._set(name, torch.zeros_like(parameter, dtype=stepped_dtype(parameter.dtype)))
            return
        if not self.buffers:
            for dtype in dict.fromkeys(stepped_dtype(p.dtype) for p in self._parameters.values()):
                self._join({n: p for n, p in self._parameters.items() if stepped_dtype(p.dtype) == dtype}, dtype)
        for buffer in self.buffers:
            buffer.zero_()

    def take(self, name: str) -> Tensor | None:
        """A parameter's gradient, which this object and the parameter then no longer hold; None where there is none."""
        parameter = self._parameters[name]
        gradient, parameter.grad = self._beside.pop(name, parameter.grad), None
        return gradient

    def beside(self) -> Mapping[str, Tensor]:
        """The gradients of the parameters that compute in less than they are stepped in, by name."""
        return self._beside

    def release(self) -> None:
        """Free the memory of all gradients."""
        self.buffers, self._beside = [], {}
        for parameter in self._parameters.values():
            parameter.grad = None

    def _join(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        sizes = [parameter.numel() for parameter in parameters.values()]
        device = next(iter(parameters.values())).device
        self.buffers.append(torch.empty(sum(sizes), dtype=dtype, device=device))
        for (name, parameter), entries in zip(parameters.items(), self.buffers[-1].split(sizes), strict=True):
            self._set(name, unflat(entries, self._specs[name], tuple(parameter.shape)))

    def _set(self, name: str, gradient: Tensor) -> None:
        parameter = self._parameters[name]
        if gradient.dtype == parameter.dtype:
            parameter.grad = gradient
        else:
            self._beside[name] = gradient

    def _add(self, name: str, parameter: Tensor) -> None:
        """Follow the backward pass of a micro-batch: add a parameter's gradient to the sum, and free it."""
        if (total := self._beside.get(name)) is not None and parameter.grad is not None:
            total += parameter.grad
            parameter.grad = None


def sum_together(gradients: Sequence[Tensor], group: RankGroup) -> None:
    """Replace each gradient by its sum over the ranks, all in one collective; they have one dtype."""
    if not gradients:
        return
    together = group.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
