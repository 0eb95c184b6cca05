"""A whole step as one CUDA graph: recorded once, then replayed with a single launch.

A step of a small model is some two hundred kernels of a few microseconds each, and the host needs longer to launch
one than the device to run it. A graph holds all kernels with their order and addresses. Its random numbers continue
from the generator's state, so a replay computes the same bits as the kernels launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, utils
from torch import Tensor

from accel_train.checkpoints.random_states import preserved_random_state
from accel_train.model.cuda_graph import capture

Outputs = tuple[Tensor, Tensor]
"""Loss and gradient norm of a step, scalars on the device."""


class RecordedStep:
    """Records a step and replays it.

    Args:
        step: ``step(batch)`` computes a step. It never waits for the device, and finds weights and optimizer state
            at the same addresses every time.
        batch: any batch, on the device. Batches of other shapes are computed kernel by kernel.
        set_frozen: ``set_frozen(True)`` makes ``step`` leave weights and optimizer state as they are.

    Raises:
        RuntimeError: ``step`` waits for the device or does something else that cannot be recorded; random states,
            weights and optimizer state are as before.
    """

    def __init__(self, step: Callable[[Any], Outputs], batch: Any, set_frozen: Callable[[bool], object]) -> None:
        self._step = step
        self._inputs = utils.recursively_apply(torch.clone, batch)
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
    """Return why the step of a run on a GPU cannot be recorded, or None if it can."""
    compiler_mode = getattr(getattr(accelerator.state, "dynamo_plugin", None), "mode", None)
    reasons = {
        "several processes": accelerator.num_processes > 1,
        "fp16's loss scaling": accelerator.scaler is not None,
        "gradient accumulation": accelerator.gradient_accumulation_steps > 1,
        "hooks": hooks,
        # It makes graphs of its own.
        f"the compiler's mode {compiler_mode!r}": compiler_mode in {"reduce-overhead", "max-autotune"},
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in the order of its structure."""
    found: list[Tensor] = []
    utils.recursively_apply(found.append, batch)
    return found
