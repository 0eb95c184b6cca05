"""The calls that a step consists of: backward, clip, optimizer, schedule, zero_grad.

:class:`Updater` makes them through Accelerate's wrappers. Without a loss scaler and without sharding these end in
plain PyTorch calls, but look at signatures, environment and installed packages in every step: 0.3 ms, which is
a sixth of a step of a very small model (docs/benchmarks.md). :class:`DirectUpdater` then calls PyTorch itself.
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


class Updater:
    """Makes the calls of a step through Accelerate.

    Args:
        accelerator: prepared the next three.
        model: the model.
        optimizer: its optimizer.
        scheduler: the optimizer's schedule.
        parameters: the parameters that are trained.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, parameters: list[nn.Parameter]
    ) -> None:
        self._accelerator, self._model, self._parameters = accelerator, model, parameters
        self._optimizer, self._scheduler = optimizer, scheduler
        self._unscaled = False

    def micro_step(self) -> AbstractContextManager[Any]:
        """Return the context of a micro-step: in the last one of a step the ranks sum their gradients."""
        return self._accelerator.accumulate(self._model)  # type: ignore[no-any-return]

    @property
    def completes_step(self) -> bool:
        """Whether the current micro-step is the last one of its step."""
        return bool(self._accelerator.sync_gradients)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-step's mean loss, a scalar, to those of its step."""
        self._accelerator.backward(loss)

    def unscale(self) -> None:
        """Divide the gradients by the loss scale, once in a step."""
        self._accelerator.unscale_gradients()
        self._unscaled = self._accelerator.scaler is not None

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of at most ``max_norm`` and return the norm before, a scalar."""
        if self._unscaled:
            # Accelerate would unscale them again.
            return nn.utils.clip_grad_norm_(self._parameters, max_norm)
        return self._accelerator.clip_grad_norm_(self._parameters, max_norm)  # type: ignore[no-any-return]

    def update(self) -> bool:
        """Update weights and schedule, and drop the gradients.

        Returns:
            Whether the weights were updated: with loss scaling, a gradient that overflows leaves weights and schedule
            as they were. Only the scale tells, which waits for the device: Accelerate takes every call of a fused
            optimizer for an update.
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
        """Do nothing: the optimizer reads the learning rates where the schedule writes them."""

    def apply(self) -> None:
        """Update the weights."""
        self._optimizer.step()

    def advance_schedule(self) -> None:
        """Set the learning rate of the next update."""
        self._scheduler.step()

    def drop_gradients(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad()


class DirectUpdater(Updater):
    """Makes the same calls in the same order, with the same bits, on the objects inside Accelerate's wrappers."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, **rest: Any) -> None:
        super().__init__(accelerator, model, optimizer.optimizer, scheduler.scheduler, **rest)
        self._accumulation: int = accelerator.gradient_accumulation_steps
        self._done = 0
        device = accelerator.device
        groups = self._optimizer.param_groups if device.type == "cuda" else []
        self._rates = [torch.zeros((), dtype=torch.float32, device=device) for _ in groups]
        self._without_sum = getattr(model, "no_sync", lambda: _NOTHING)

    def micro_step(self) -> AbstractContextManager[Any]:
        """See :meth:`Updater.micro_step`."""
        self._done += 1
        return _NOTHING if self.completes_step else self._without_sum()

    @property
    def completes_step(self) -> bool:
        """See :meth:`Updater.completes_step`."""
        return self._done % self._accumulation == 0

    def backward(self, loss: Tensor) -> None:
        """See :meth:`Updater.backward`."""
        torch.autograd.backward(loss if self._accumulation == 1 else loss / self._accumulation)

    def unscale(self) -> None:
        """Do nothing: there is no loss scale."""

    def update(self) -> bool:
        """See :meth:`Updater.update`."""
        self.send_rates()
        self.apply()
        self.advance_schedule()
        self.drop_gradients()
        return True

    def send_rates(self) -> None:
        """Copy the learning rates to the GPU, where :meth:`apply` reads them: a CUDA graph takes no numbers."""
        if self._rates:
            for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])

    def apply(self) -> None:
        """See :meth:`Updater.apply`; on a GPU with the learning rates last sent, with the same bits recorded or not."""
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
        """See :meth:`Updater.clip`."""
        return nn.utils.clip_grad_norm_(self._parameters, max_norm)


def build_updater(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, scheduler: Any, parameters: list[nn.Parameter]
) -> Updater:
    """Return a :class:`DirectUpdater` where Accelerate's wrappers add nothing, else an :class:`Updater`."""
    plain = accelerator.distributed_type in _PLAIN and accelerator.scaler is None
    kind = DirectUpdater if plain else Updater
    return kind(accelerator, model, optimizer, scheduler, parameters=parameters)
