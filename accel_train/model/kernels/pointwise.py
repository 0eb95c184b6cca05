"""Work on each element of a tensor, faster on a CPU than PyTorch's: GELU and dropout.

GELU (tanh approximation, as in GPT-2) is computed by the sigmoid:

    0.5 x (1 + tanh u) = x sigmoid(2 u),   u = sqrt(2 / pi) (x + 0.044715 x^3)   (Hendrycks & Gimpel 2016)

On a CPU PyTorch's tanh takes three times as long as its sigmoid, and its backward pass computes it
again. Here the sigmoid is stored for the backward pass: forward and backward pass together take 0.7 of
the time, for four more bytes per element (docs/notes.md).

The mask of dropout is made from raw random bits. ``torch.nn.Dropout`` draws one Bernoulli number per element
there, on one core: 7 % of a training step of the default text model on an AMD processor. Here one 64-bit random
integer decides about four elements, 16 bits each, which takes a quarter of the time (docs/notes.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = _LINEAR * 0.044715
_MIN_ELEMENTS = 1 << 18
"""With fewer elements calling several kernels costs more than it saves."""
LEVELS = 1 << 16
"""Values of the 16 bits of one element: probabilities are multiples of 2^-16."""


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


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, faster on a CPU.

    In training each element is zeroed independently with probability ``p``, and the others are
    divided by the probability of being kept, which preserves the expectation. The mask comes from
    torch's global generator and does not depend on the number of threads.

    On a CPU ``p`` is rounded to a multiple of 2^-16; the factor follows from the rounded one. Other
    devices and compiled graphs use torch's own dropout, which is fast there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map a tensor of any shape and floating-point dtype to the same shape and dtype."""
        if not self.training or self.p == 0:
            return input
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return functional.dropout(input, self.p)
        dropped = round(self.p * LEVELS)
        if dropped == LEVELS:
            return input * torch.zeros_like(input)
        keep = _random_int16(input.shape) >= dropped - LEVELS // 2
        # A factor of the input's dtype is faster than one of booleans, forward and backward.
        return input * keep.to(input.dtype).mul_(LEVELS / (LEVELS - dropped))


def _random_int16(shape: torch.Size) -> Tensor:
    """Return an int16 tensor, uniform over all values."""
    elements = shape.numel()
    words = torch.empty((elements + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[:elements].view(shape)
