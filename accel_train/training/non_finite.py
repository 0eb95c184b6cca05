"""What stopped training: asked only when it has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on whatever device: torch raises a plain ``RuntimeError`` on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def first_bad_tensor(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], torch.Tensor]) -> str | None:
    """Name the first non-finite parameter, else activation, else loss, else gradient of one forward and backward.

    Args:
        model: unwrapped, so that no other rank takes part.
        batch: the micro-batch to replay.
        loss_fn: as the trainer's.

    Returns:
        Such as ``parameter blocks.0.attention.qkv.weight``, or None when everything is finite.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    found: list[str] = []
    handles = [module.register_forward_hook(_watch(name, found)) for name, module in model.named_modules() if name]
    try:
        model.zero_grad()
        loss = loss_fn(model, batch)
        if found:
            return f"activation of {found[0]}"
        if not _finite(loss):
            return "loss"
        torch.autograd.backward(loss)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not _finite(parameter.grad):
                return f"gradient of {name}"
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
    return None


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else (output,)
        if any(isinstance(o, torch.Tensor) and not _finite(o) for o in outputs):
            found.append(name)

    return hook
