"""The output layer and its cross-entropy in one function, without ever holding all logits.

With a vocabulary of thousands the logits are by far the largest tensor of a small model: with 131 MB
for the default text model, each step would write and read them several times. Here a few hundred rows at a
time go through the output layer. While their probabilities are in the processor's cache, the
gradients are computed too, so that the backward pass only scales them. (The idea is that of Wijmans
et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", without its special kernels.)
The price is memory for the gradients from the forward pass on: as much as the output layer and
its input take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits computed at a time, by type of device.

32 MiB in float32 were the fastest of 2 to 64 MiB on two CPU cores (docs/notes.md). On a GPU every chunk is some forty
kernels, which are launched, recorded or compiled one by one: 1 GiB makes 4 chunks of GPT-2's 16 times 1024 tokens.
"""
_SMALLEST_PROBABILITY = 1e-30
IGNORED = -100
"""The target of a position without loss, as in ``torch.nn.functional.cross_entropy``."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of the logits ``x @ weight.T``.

    Args:
        x: ``(rows, width)``.
        weight: weight of the output layer, ``(vocab, width)``.
        targets: int64 ``(rows,)``; the mean leaves out those that are :data:`IGNORED`.

    Returns:
        A float32 scalar; NaN when every target is ignored.
    """
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, wants_gradient)  # type: ignore[no-any-return,no-untyped-call]


def _is_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _negative_logarithm(probability: Tensor, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the losses ``(rows, 1)`` of targets from their float32 probabilities ``(rows, 1)``.

    This saves two passes over all logits. A probability near the smallest float32 has too few digits: the loss of
    such a row, above 69 nats, is computed from its logits. Testing for such rows waits for the device.
    """
    loss = -probability.log()
    tiny = (probability < _SMALLEST_PROBABILITY).squeeze(1)
    if tiny.any():
        logits = functional.linear(x[tiny], weight).float()
        loss[tiny] = logits.logsumexp(dim=1, keepdim=True) - logits.gather(1, targets[tiny])
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
        on_cpu = _is_on_cpu(x)
        chunk = max(1, CHUNK_ELEMENTS["cpu" if on_cpu else "cuda"] // weight.shape[0])
        plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        total = x.new_zeros((), dtype=torch.float32)
        # In float32: divided by the number of rows, the entries would be too small for float16.
        x_gradient = x.new_empty(x.shape if wants_gradient else 0, dtype=torch.float32)
        weight_gradient = weight.new_zeros(weight.shape if wants_gradient else 0, dtype=torch.float32)
        # One buffer for all chunks: new memory for each costs a third of the time on a CPU.
        buffer = x.new_empty(min(chunk, len(x)), weight.shape[0], dtype=torch.float32)
        vocabulary = None if on_cpu else torch.arange(weight.shape[0], device=x.device)
        for start in range(0, len(x), chunk):
            part, wanted = x[start : start + chunk], targets[start : start + chunk]
            counts = (wanted != IGNORED).unsqueeze(1)
            index = wanted.clamp(min=0).unsqueeze(1)
            logits = buffer[: len(part)]
            if plain:
                torch.mm(part, weight.t(), out=logits)
            else:
                logits.copy_(functional.linear(part, weight))
            if on_cpu:
                probability = torch.softmax(logits, dim=1, out=logits)
                loss = _negative_logarithm(probability.gather(1, index), part, weight, index)
            else:
                wanted_logit, largest = logits.gather(1, index), logits.amax(dim=1, keepdim=True)
                probability = torch.softmax(logits, dim=1, out=logits)
                # The largest probability is 1 over the sum of exponentials, which saves a second pass.
                loss = largest - probability.amax(dim=1, keepdim=True).log() - wanted_logit
            total += loss.masked_fill(~counts, 0.0).sum()
            if not wants_gradient:
                continue
            if vocabulary is None:
                gradient = probability.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
            else:
                # The same bits. Deterministic, scatter_add_ sorts its places, and in PyTorch 2.6 waits for the device.
                gradient = probability.add_(vocabulary == index, alpha=-1)
            # Ignored rows are zeroed in the two narrow factors, not in the wide one between them.
            part_gradient, part = x_gradient[start : start + chunk], part * counts
            if plain:
                torch.mm(gradient, weight, out=part_gradient)
                weight_gradient.addmm_(gradient.t(), part)
            else:
                gradient = gradient.to(part.dtype)
                part_gradient.copy_(gradient @ weight.to(part.dtype))
                weight_gradient += gradient.t() @ part
            part_gradient.mul_(counts)
        count = (targets != IGNORED).sum()
        ctx.save_for_backward(x_gradient, weight_gradient, count)
        ctx.dtypes = x.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_gradient, weight_gradient, count = ctx.saved_tensors
        scale = gradients[0] / count
        x_type, weight_type = ctx.dtypes
        return (x_gradient * scale).to(x_type), (weight_gradient * scale).to(weight_type), None, None
