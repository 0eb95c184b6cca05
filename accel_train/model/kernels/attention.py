"""Causal self-attention for training on a CPU, which stores the attention weights for the backward pass.

PyTorch's CPU kernel stores no weights and computes them again in its backward pass. In a short context
they take about as much memory as queries, keys and values, and computing them is most of the work: with
stored weights, forward and backward pass together take 0.8 to 0.9 of the time. The same function rotates
queries and keys by their rotary positions (the backward pass rotates back): with them it takes 0.67 to
0.8 of the time (docs/notes.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MIN_WEIGHTS = 1 << 18
"""With fewer weights (sequences times heads times context squared) calling several kernels costs more than it saves."""
_MAX_CONTEXT, _MAX_CONTEXT_PER_WIDTH = 256, 4
"""Longest context with stored weights, in tokens and in head widths: their number grows with its square."""
_BLOCK_QUERIES = 64
"""Queries computed together; scores of keys after the last of them are not computed."""

Angles = tuple[Tensor, Tensor]
"""Cosine and sine of the rotation of every position, ``(time, head_width)`` each."""


def should_store_weights(packed: Tensor) -> bool:
    """Return whether :func:`causal_attention` is faster than PyTorch's: for float32, on a CPU, with gradients.

    Without gradients PyTorch's is faster, so the last digits of a model's output depend on whether they are computed.
    """
    batch, time, _, heads, width = packed.shape
    return (
        packed.device.type == "cpu"
        and packed.dtype == torch.float32
        and torch.is_grad_enabled()
        and packed.requires_grad
        and time <= min(_MAX_CONTEXT, _MAX_CONTEXT_PER_WIDTH * width)
        and batch * heads * time * time >= _MIN_WEIGHTS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def causal_attention(packed: Tensor, angles: Angles | None) -> Tensor:
    """Compute what causal ``scaled_dot_product_attention`` does, up to rounding.

    Args:
        packed: queries, keys and values, float32 ``(batch, time, 3, heads, head_width)``.
        angles: rotation of queries and keys; None for no rotation.

    Returns:
        float32 ``(batch, time, heads * head_width)``.
    """
    return _AttentionWithStoredWeights.apply(packed, *(angles or ()))  # type: ignore[no-any-return,no-untyped-call]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    rotated = x * cos
    rotated[..., :half].addcmul_(second, sin[:, :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[:, half:])
    return rotated


def _product(one: Tensor, other: Tensor, into: Tensor) -> None:
    """Write the batched product to ``into``, without a copy if that is contiguous."""
    if into.is_contiguous():
        torch.bmm(one, other, out=into)
    else:
        into.copy_(one @ other)


def _blocks(time: int) -> list[tuple[slice, slice]]:
    """Return the queries of each block, and the keys that they attend to."""
    ends = [(start, min(start + _BLOCK_QUERIES, time)) for start in range(0, time, _BLOCK_QUERIES)]
    return [(slice(start, end), slice(0, end)) for start, end in ends]


class _AttentionWithStoredWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, *angles: Tensor) -> Tensor:
        batch, time, _, heads, width = packed.shape
        # Always a copy, because it is changed in place.
        inputs = packed.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format)
        if angles:
            inputs[:2] = _rotated(inputs[:2], *angles)
        inputs[0] *= width**-0.5
        inputs = inputs.view(3, batch * heads, time, width)
        query, key, value = inputs
        mixed, kept = torch.empty_like(query), []
        for rows, keys in _blocks(time):
            later = query.new_full((rows.stop - rows.start, rows.stop), -torch.inf).triu_(1 + rows.start)
            weights = torch.baddbmm(later, query[:, rows], key[:, keys].mT).softmax(dim=-1)
            _product(weights, value[:, keys], into=mixed[:, rows])
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
        # The last block attends to all keys: its gradients are written first, those of the others added.
        for weights, (rows, keys) in reversed(list(zip(kept, blocks, strict=True))):
            of_weights = gradient[:, rows] @ value[:, keys].mT
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _product(of_scores, key[:, keys], into=of_query[:, rows])
            if rows.stop == time:
                _product(of_scores.mT, query[:, rows], into=of_key)
                _product(weights.mT, gradient[:, rows], into=of_value)
            else:
                of_key[:, keys] += of_scores.mT @ query[:, rows]
                of_value[:, keys] += weights.mT @ gradient[:, rows]
        of_query *= width**-0.5
        gradients = gradients.view(3, -1, ctx.heads, time, width)
        if angles:
            cos, sin = angles
            gradients[:2] = _rotated(gradients[:2], cos, -sin)
        return gradients.permute(1, 3, 0, 2, 4).contiguous(), *(None for _ in angles)
