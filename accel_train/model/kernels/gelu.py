"""GELU (tanh approximation, as in GPT-2), computed by the sigmoid on a CPU.

    0.5 x (1 + tanh u) = x sigmoid(2 u),   u = sqrt(2 / pi) (x + 0.044715 x^3)   (Hendrycks & Gimpel 2016)

On a CPU PyTorch's tanh takes three times as long as its sigmoid, and its backward pass computes it
again. Here the sigmoid is stored for the backward pass: forward and backward pass together take 0.7 of
the time, for four more bytes per element (docs/notes.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = _LINEAR * 0.044715
_MIN_ELEMENTS = 1 << 18
"""With fewer elements calling several kernels costs more than it saves."""


def gelu(x: Tensor) -> Tensor:
    """Compute ``functional.gelu(x, approximate="tanh")``; up to rounding for large float32 tensors on a CPU.

    For these the gradient is NaN beyond 1e12, where that of the cube overflows; PyTorch's is finite up to 1e18.
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.numel() < _MIN_ELEMENTS
        or not x.is_contiguous()
        or torch.compiler.is_compiling()
    ):
        return functional.gelu(x, approximate="tanh")
    return _BySigmoid.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def _inner_slope(x: Tensor, cubic: float) -> Tensor:
    return torch.addcmul(x.new_tensor(_LINEAR), x, x, value=cubic)


class _BySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = _inner_slope(x, _CUBIC).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        # gate + x gate (1 - gate) 2u'
        slope = _inner_slope(x, 3 * _CUBIC).mul_(x)
        torch.ops.aten.sigmoid_backward.grad_input(slope, gate, grad_input=slope)
        return slope.add_(gate).mul_(gradient)
