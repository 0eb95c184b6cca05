"""A whole step as one CUDA graph: recorded once, then started with a single launch.

For a small model the launches are the step: some two hundred kernels of a few microseconds each, and the
host needs longer to start one than the device to run it. A graph holds them all, with their order and
their addresses, and random numbers go on from where the generator stands, so a replay computes what the
kernels one by one would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor

from accel_train.model.cuda_graph import capture
from accel_train.ranks.accelerator import preserved_random_state

Outputs = tuple[Tensor, Tensor]
Step = Callable[[Any], Outputs]
"""``step(batch)``: the device's part of a step; returns its loss and gradient norm, scalars on the device."""


class RecordedStep:
    """A step that is replayed.

    Args:
        step: asks the device nothing, and finds weights and optimizer state at the same addresses every time.
        batch: any batch, on the device. Others that differ from it in shape are computed kernel by kernel.
        set_frozen: ``set_frozen(True)`` makes ``step`` leave weights and optimizer state as they are.

    Raises:
        RuntimeError: ``step`` asks the device something or does what else cannot be recorded; random states,
            weights and optimizer state are as before.
    """

    def __init__(self, step: Step, batch: Any, set_frozen: Callable[[bool], object]) -> None:
        self._step = step
        self._inputs = recursively_apply(torch.clone, batch)
        self._places = _tensors(self._inputs)
        self._shapes = [tensor.shape for tensor in self._places]
        device = self._places[0].device
        set_frozen(True)
        try:
            with preserved_random_state(device):
                self._outputs, self._replay = capture(lambda: step(self._inputs), device)
        finally:
            set_frozen(False)

    def __call__(self, batch: Any) -> Outputs:
        """Run the step on ``batch``; the tensors returned are overwritten by the next one."""
        tensors = _tensors(batch)
        if [tensor.shape for tensor in tensors] != self._shapes:
            return self._step(batch)
        for place, given in zip(self._places, tensors, strict=True):
            place.copy_(given, non_blocking=True)
        self._replay()
        return self._outputs


def why_not(accelerator: Accelerator, *, hooks: bool) -> str | None:
    """Why the step of a run on a GPU is not recorded, or None where it can be."""
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    reasons = {
        "several processes": accelerator.num_processes > 1,
        "fp16's loss scaling": accelerator.scaler is not None,
        "gradient accumulation": accelerator.gradient_accumulation_steps > 1,
        "hooks": hooks,
        # It makes graphs of its own.
        f"the compiler's mode {getattr(dynamo, 'mode', None)!r}": getattr(dynamo, "mode", None)
        in {"reduce-overhead", "max-autotune"},
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of its structure."""
    found: list[Tensor] = []
    recursively_apply(found.append, batch)
    return found
