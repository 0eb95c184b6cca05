"""Why a loss or gradient was not finite: found by a replay after training has stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from accel_train.errors import NonFinite
from accel_train.ranks.coordinator import Coordinator
from accel_train.training.losses import LossFunction


def replay(
    step: int, model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction, coordinator: Coordinator
) -> NonFinite:
    """Replay the batch of a step that is not finite on every rank, and return the error that names what is not.

    Args:
        step: 1-based number of the update that could not be made.
        model: unwrapped.
        batches: this rank's micro-batches of the step.
        loss_fn: ``loss_fn(model, batch)`` returns the loss.
        coordinator: gathers what the ranks found.
    """
    found = (first_bad_tensor(model, batch, loss_fn) for batch in batches)
    finding = next((name for name in found if name), None)
    findings = coordinator.gather("diagnosis of a non-finite loss", finding)
    rank, first = next(((r, f) for r, f in enumerate(findings) if f), (0, None))
    return NonFinite(step, f"{first} on rank {rank}" if first else "nothing non-finite in a replay of its batch")


def first_bad_tensor(model: nn.Module, batch: Any, loss_fn: LossFunction) -> str | None:
    """Return the name of the first non-finite parameter, else activation, else loss, else gradient.

    Args:
        model: unwrapped, so that the forward and backward here are no collective.
        batch: the micro-batch to replay.
        loss_fn: ``loss_fn(model, batch)`` returns the loss.

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
