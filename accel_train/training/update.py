"""Backward pass, clipping and update of a step: through Accelerate's wrappers, or past them.

Without a loss scaler and without sharding the wrappers come to plain PyTorch calls, but find that
out anew in every step (by signatures, environment and packages on disk): 0.3 ms, which is
nothing to a large model and a sixth of a step to a very small one (docs/benchmarks.md).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

_PLAIN = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
_NOTHING: AbstractContextManager[None] = nullcontext()


class Mechanics:
    """What Accelerate prepared, used through Accelerate.

    Args:
        accelerator: prepared the others.
        model: prepared.
        optimizer: prepared.
        scheduler: prepared.
        parameters: those that are trained.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, parameters: list[nn.Parameter]
    ) -> None:
        self._accelerator, self._model, self._parameters = accelerator, model, parameters
        self._optimizer, self._scheduler = optimizer, scheduler
        self._unscaled = False

    def micro_step(self) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-step: ranks sum their gradients in a step's last one only."""
        return self._accelerator.accumulate(self._model)  # type: ignore[no-any-return]

    @property
    def completes_step(self) -> bool:
        """Whether the micro-step at hand is its step's last."""
        return bool(self._accelerator.sync_gradients)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-step's mean loss, a scalar, to those of its step."""
        self._accelerator.backward(loss)

    def unscale(self) -> None:
        """Turn the gradients into those of the true loss, once in a step."""
        self._accelerator.unscale_gradients()
        self._unscaled = self._accelerator.scaler is not None

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of at most ``max_norm``; returns the norm before, a scalar."""
        if self._unscaled:
            # Accelerate would unscale them again.
            return nn.utils.clip_grad_norm_(self._parameters, max_norm)
        return self._accelerator.clip_grad_norm_(self._parameters, max_norm)  # type: ignore[no-any-return]

    def update(self) -> bool:
        """Optimizer, schedule, and gradients away.

        Returns:
            Whether it was made: with loss scaling a gradient that overflows leaves the weights and the schedule as
            they were. Only the scale tells, at the price of waiting for the device: a fused optimizer is called in any
            case and Accelerate takes the call for an update.
        """
        scaler = self._accelerator.scaler
        scale = 0.0 if scaler is None else scaler.get_scale()
        self.apply()
        made = scaler is None or scaler.get_scale() >= scale
        if made:
            self.advance_schedule()
        self._unscaled = False
        self.drop_gradients()
        return made

    def send_rates(self) -> None:
        """Nothing: the optimizer reads the learning rates where the schedule writes them."""

    def apply(self) -> None:
        """The optimizer's update alone."""
        self._optimizer.step()

    def advance_schedule(self) -> None:
        """To the learning rate of the next update."""
        self._scheduler.step()

    def drop_gradients(self) -> None:
        """Without an update."""
        self._optimizer.zero_grad()


class DirectMechanics(Mechanics):
    """The same calls, in the same order and with the same bits, on what is inside the wrappers."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, **rest: Any) -> None:
        super().__init__(accelerator, model, optimizer.optimizer, scheduler.scheduler, **rest)
        self._accumulation: int = accelerator.gradient_accumulation_steps
        self._done = 0
        device = accelerator.device
        groups = self._optimizer.param_groups if device.type == "cuda" else []
        self._rates = [torch.zeros((), dtype=torch.float32, device=device) for _ in groups]
        self._without_sum = getattr(model, "no_sync", lambda: _NOTHING)

    def micro_step(self) -> AbstractContextManager[Any]:
        """See :meth:`Mechanics.micro_step`."""
        self._done += 1
        return _NOTHING if self.completes_step else self._without_sum()

    @property
    def completes_step(self) -> bool:
        """See :meth:`Mechanics.completes_step`."""
        return self._done % self._accumulation == 0

    def backward(self, loss: Tensor) -> None:
        """See :meth:`Mechanics.backward`."""
        torch.autograd.backward(loss if self._accumulation == 1 else loss / self._accumulation)

    def unscale(self) -> None:
        """Nothing was scaled."""

    def update(self) -> bool:
        """See :meth:`Mechanics.update`."""
        self.send_rates()
        self.apply()
        self.advance_schedule()
        self.drop_gradients()
        return True

    def send_rates(self) -> None:
        """Learning rates to the GPU, where :meth:`apply` reads them: a recorded update takes no numbers."""
        if self._rates:
            for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])

    def apply(self) -> None:
        """See :meth:`Mechanics.apply`; on a GPU with the learning rates last sent, the same bits recorded or not."""
        if not self._rates:
            self._optimizer.step()
            return
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        recording = torch.cuda.is_current_stream_capturing()
        try:
            for rate, group in zip(self._rates, groups, strict=True):
                group["lr"], group["capturable"] = rate, recording
            self._optimizer.step()
        finally:
            # What a checkpoint holds is plain numbers.
            for number, group in zip(numbers, groups, strict=True):
                group["lr"], group["capturable"] = number, False

    def clip(self, max_norm: float) -> Tensor:
        """See :meth:`Mechanics.clip`."""
        return nn.utils.clip_grad_norm_(self._parameters, max_norm)


def mechanics(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, parameters: list[nn.Parameter]
) -> Mechanics:
    """The direct one where the wrappers add nothing."""
    plain = accelerator.distributed_type in _PLAIN and accelerator.scaler is None
    kind = DirectMechanics if plain else Mechanics
    return kind(accelerator, model, optimizer, scheduler, parameters=parameters)
