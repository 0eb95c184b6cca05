"""The output layer and its cross-entropy in one, without ever holding all logits.

With a vocabulary of thousands the logits are the largest tensor of a small model by far: the
anchor of the text task would write and read 131 MB of them several times in every step. Here a
few hundred rows at a time go through the output layer; while their probabilities are in the
cache, the gradients are made as well, so that the backward pass only scales them. (The idea is
that of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", without its
special kernels.) The price is memory for the gradients from the forward pass on: as much as the
output layer and its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits at a time: 16 MiB in float32, which two cores' caches still help with."""
IGNORED = -100
"""A target that counts for nothing, as in ``torch.nn.functional.cross_entropy``."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the logits ``x @ weight.T``.

    Args:
        x: ``(rows, width)``.
        weight: of the output layer, ``(vocab, width)``.
        targets: int64 ``(rows,)``; :data:`IGNORED` ones are left out of the mean.

    Returns:
        A float32 scalar; NaN when every target is ignored.
    """
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, wants_gradient)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        counted = (targets != IGNORED).sum()
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        # In float32: divided by the number of rows the entries would be too small for float16.
        x_gradient = torch.empty(x.shape, dtype=torch.float32, device=x.device) if wants_gradient else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wants_gradient else None
        for start in range(0, x.shape[0], rows):
            part, wanted = x[start : start + rows], targets[start : start + rows]
            kept = wanted != IGNORED
            index = wanted.clamp(min=0).unsqueeze(1)
            log_probability = torch.nn.functional.linear(part, weight).float().log_softmax(dim=-1)
            total -= (log_probability.gather(1, index).squeeze(1) * kept).sum()
            if x_gradient is None or weight_gradient is None:
                continue
            gradient = log_probability.exp_()
            gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
            gradient *= kept.unsqueeze(1)
            gradient = gradient.to(part.dtype)
            x_gradient[start : start + rows] = gradient @ weight.to(part.dtype)
            weight_gradient += gradient.t() @ part
        ctx.save_for_backward(x_gradient, weight_gradient, counted)
        ctx.dtypes = x.dtype, weight.dtype
        return total / counted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_gradient, weight_gradient, counted = ctx.saved_tensors
        scale = gradients[0] / counted
        x_type, weight_type = ctx.dtypes
        return (x_gradient * scale).to(x_type), (weight_gradient * scale).to(weight_type), None, None
