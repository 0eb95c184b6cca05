"""Causal self-attention for training on a CPU: queries, keys and values in one tensor, the weights kept.

PyTorch's kernel for processors keeps no weights and computes them anew in its backward pass. While the
context is short they take no more memory than queries, keys and values do, about, and computing them is
most of the work: kept, attention takes 0.8 to 0.9 of the time, forward and backward. Rotary positions,
whose backward pass is the rotation back, are done in the same function for queries and keys at once: with
them it takes 0.67 to 0.8 (docs/notes.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORTH_IT = 1 << 18
"""Weights, sequences times heads times context squared, from which on the several kernels cost less than they save."""
_LONGEST, _WIDTHS = 256, 4
"""Context, as such and in widths of a head, up to which they are kept: their number grows with its square."""
_ROWS = 64
"""Queries taken together; what comes after the last of them is not computed."""

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of the rotation of every position, ``(time, head_width)`` each."""


def keeping_weights_pays(packed: Tensor) -> bool:
    """Whether :func:`causal_attention` is the faster way for ``packed``: float32, on a CPU, with a gradient to come.

    Without one the kernel is, so the last digits of what a model computes depend on whether gradients are wanted.
    """
    batch, time, _, heads, width = packed.shape
    return (
        packed.device.type == "cpu"
        and packed.dtype == torch.float32
        and torch.is_grad_enabled()
        and packed.requires_grad
        and time <= min(_LONGEST, _WIDTHS * width)
        and batch * heads * time * time >= _WORTH_IT
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def causal_attention(packed: Tensor, angles: Angles | None) -> Tensor:
    """What causal ``scaled_dot_product_attention`` computes, to the last digits.

    Args:
        packed: queries, keys and values, float32 ``(batch, time, 3, heads, head_width)``.
        angles: by which queries and keys are rotated first; None: not at all.

    Returns:
        ``(batch, time, heads * head_width)``.
    """
    return _KeptWeights.apply(packed, *(angles or ()))  # type: ignore[no-any-return,no-untyped-call]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    rotated = x * cos
    rotated[..., :half].addcmul_(second, sin[:, :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[:, half:])
    return rotated


def _product(one: Tensor, other: Tensor, into: Tensor) -> None:
    """The batched product, straight into where it belongs if that is in one piece."""
    if into.is_contiguous():
        torch.bmm(one, other, out=into)
    else:
        into.copy_(one @ other)


def _blocks(time: int) -> list[tuple[slice, slice]]:
    """Queries that are taken together, and all that they may look at."""
    ends = [(start, min(start + _ROWS, time)) for start in range(0, time, _ROWS)]
    return [(slice(start, end), slice(0, end)) for start, end in ends]


class _KeptWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, *angles: Tensor) -> Tensor:
        batch, time, _, heads, width = packed.shape
        # A copy in any case: it is written to.
        inputs = packed.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
        if angles:
            inputs[:2] = _rotated(inputs[:2], *angles)
        inputs[0] *= width**-0.5
        inputs = inputs.view(3, batch * heads, time, width)
        query, key, value = inputs
        mixed, kept = torch.empty_like(query), []
        for rows, seen in _blocks(time):
            later = query.new_full((rows.stop - rows.start, rows.stop), -torch.inf).triu_(1 + rows.start)
            weights = torch.baddbmm(later, query[:, rows], key[:, seen].mT).softmax(dim=-1)
            _product(weights, value[:, seen], into=mixed[:, rows])
            kept.append(weights)
        ctx.save_for_backward(inputs, *kept, *angles)
        ctx.heads = heads
        return mixed.view(batch, heads, time, width).transpose(1, 2).reshape(batch, time, heads * width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *saved = ctx.saved_tensors
        query, key, value = inputs
        time, width = query.shape[1:]
        blocks = _blocks(time)
        kept, angles = saved[: len(blocks)], saved[len(blocks) :]
        gradient = gradient.view(-1, time, ctx.heads, width).transpose(1, 2).reshape(query.shape)
        gradients = torch.empty_like(inputs)
        of_query, of_key, of_value = gradients
        # From the end, where all keys are seen: the last block's gradients are written, the others' added.
        for weights, (rows, seen) in reversed(list(zip(kept, blocks, strict=True))):
            of_weights = gradient[:, rows] @ value[:, seen].mT
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _product(of_scores, key[:, seen], into=of_query[:, rows])
            if rows.stop == time:
                _product(of_scores.mT, query[:, rows], into=of_key)
                _product(weights.mT, gradient[:, rows], into=of_value)
            else:
                of_key[:, seen] += of_scores.mT @ query[:, rows]
                of_value[:, seen] += weights.mT @ gradient[:, rows]
        of_query *= width**-0.5
        gradients = gradients.view(3, -1, ctx.heads, time, width)
        if angles:
            cos, sin = angles
            gradients[:2] = _rotated(gradients[:2], cos, -sin)
        return gradients.permute(1, 3, 0, 2, 4).contiguous(), *(None for _ in angles)
