"""GELU (tanh approximation, as GPT-2), by way of the sigmoid on a CPU.

    0.5 x (1 + tanh u) = x sigmoid(2 u),   u = sqrt(2 / pi) (x + 0.044715 x^3)   (Hendrycks & Gimpel 2016)

Where processors have no tanh of their own, PyTorch's takes three times the time of its sigmoid, and its
backward pass takes another. Here the sigmoid is kept for the backward pass: 0.7 of the time, forward
and backward, for four more bytes per element (docs/notes.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = _LINEAR * 0.044715
_WORTH_IT = 1 << 18
"""Elements from which on the time saved is more than what a function of several kernels costs."""


def gelu(x: Tensor) -> Tensor:
    """``functional.gelu(x, approximate="tanh")``, of any shape; large float32 tensors on a CPU to the last digits.

    There the gradient is NaN beyond 1e12, where the cube's is no longer a float32; PyTorch's holds out until 1e18.
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or x.numel() < _WORTH_IT
        or not x.is_contiguous()
        or torch.compiler.is_compiling()
    ):
        return functional.gelu(x, approximate="tanh")
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x * _gate(x)
    return _BySigmoid.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def _gate(x: Tensor) -> Tensor:
    """The factor of ``x``: ``sigmoid(2 u)``."""
    return _inner_slope(x, _CUBIC).mul_(x).sigmoid_()


def _inner_slope(x: Tensor, cubic: float) -> Tensor:
    return torch.addcmul(x.new_tensor(_LINEAR), x, x, value=cubic)


class _BySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = _gate(x)
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
