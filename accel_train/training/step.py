"""One step: forward, loss and backward of its micro-steps, then clipping, optimizer, schedule and zero_grad.

On a CPU a loss or gradient that is not finite ends the step at once. On a GPU the host does not wait to see it: from
the first bad step on the fused optimizer changes nothing, and the host finds out at the next log boundary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from accel_train.config.sections import TrainingConfig
from accel_train.model.transformer import TransformerLM
from accel_train.training.hooks import Hooks
from accel_train.training.losses import fused_cross_entropy, next_token_cross_entropy
from accel_train.training.recorded_step import RecordedStep, why_not
from accel_train.training.update import build_updater

log = logging.getLogger(__name__)

_MAX_SKIPPED_IN_A_ROW = 50
"""Overflows of fp16 gradients in a row that end a run: the loss scale is then 2^-50 of what it was."""

_OUR_LOSSES = (next_token_cross_entropy, fused_cross_entropy)

LossFunction = Callable[[nn.Module, Any], Tensor]


class Outcome(Enum):
    """How an update ended."""

    MADE = auto()
    """The optimizer was called; on a GPU only :meth:`Step.updates_made` tells whether the weights changed."""
    SKIPPED = auto()
    """Loss scaling left the weights and the schedule as they were."""
    NOT_FINITE = auto()
    """The loss or a gradient is not finite on some rank, or no loss scale is small enough; training ends."""


class Step:
    """Computes the steps of a run on this rank.

    Args:
        accelerator: as :func:`accel_train.ranks.accelerator.build_accelerator` returns it.
        model: prepared by the accelerator, as the next two.
        optimizer: prepared.
        scheduler: prepared.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar mean.
        config: configuration of the loop.
        hooks: get the gradients of every step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        *,
        loss_fn: LossFunction,
        config: TrainingConfig,
        hooks: Hooks | None,
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.updater = build_updater(accelerator, model, optimizer, scheduler, self.parameters)
        self.grad_norm: Tensor | None = None
        """Gradient norm of the last step before clipping, a scalar on the device."""
        self._accelerator, self._model, self._loss_fn, self._config = accelerator, model, loss_fn, config
        self._hooks = hooks
        self._max_norm = config.max_grad_norm or math.inf
        self._skipped_in_a_row = 0
        # With loss scaling an overflow is normal and the scaler skips the step by itself.
        self._watches_norm = accelerator.scaler is None
        self._frozen = torch.zeros((), dtype=torch.float32, device=accelerator.device)
        self._updates = torch.zeros_like(self._frozen)
        self._recorded: RecordedStep | None = None
        self.freezes_on_device = False
        if self._watches_norm and accelerator.device.type == "cuda":
            self.freeze_on_device(optimizer.optimizer)

    def freeze_on_device(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the fused ``optimizer`` skip its updates from the first bad step on, without the host waiting."""
        self.freezes_on_device = True
        optimizer.found_inf = self._frozen  # type: ignore[attr-defined]

    def micro_step(self, batch: Any) -> Tensor:
        """Compute forward, loss and backward on this rank's slice of a micro-step.

        Returns:
            The mean loss, a scalar on the device.
        """
        if self._recorded is not None:
            self.updater.send_rates()
            loss, self.grad_norm = self._recorded(batch)
            return loss
        with self.updater.micro_step():
            return self._backward(batch)

    def _backward(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._model, batch)
        value = loss.detach()
        if self._accelerator.num_processes > 1:
            # Times 1 exactly, or NaN: a loss that is not finite reaches every rank's gradients.
            loss = loss * (value * 0 + 1)
        self.updater.backward(loss)
        return value

    @property
    def is_complete(self) -> bool:
        """Whether the last micro-step was the last one of its step, so that :meth:`update` follows."""
        return self._recorded is not None or self.updater.completes_step

    def update(self, loss: Tensor, step: int) -> Outcome:
        """Run the update hooks, clip, and update weights and schedule; the gradients are gone afterwards.

        Args:
            loss: loss of the last micro-step.
            step: steps done before this one.
        """
        if self._recorded is not None:
            self.updater.advance_schedule()
            return Outcome.MADE
        if self._hooks:
            # Hooks see true gradients: without this fp16's would still be multiplied by the loss scale.
            self.updater.unscale()
            self._hooks.apply_update(step, self.parameters)
        self.grad_norm = norm = self.updater.clip(self._max_norm)
        if self.freezes_on_device:
            self._freeze_unless_finite(loss, norm)
        elif self._watches_norm and not math.isfinite(float(norm) + float(loss)):
            # On CPU reading costs nothing; the norm is that of the summed gradients, equal on all ranks.
            return Outcome.NOT_FINITE
        if self.updater.update():
            self._skipped_in_a_row = 0
            return Outcome.MADE
        self._skipped_in_a_row += 1
        # No scale is small enough: it is not the scale. The gradients of all ranks are equal, so all leave.
        return Outcome.NOT_FINITE if self._skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW else Outcome.SKIPPED

    def _freeze_unless_finite(self, loss: Tensor, norm: Tensor) -> None:
        self._frozen.masked_fill_((norm + loss).isfinite().logical_not_(), 1.0)
        self._updates.add_(1.0 - self._frozen)

    def updates_made(self) -> int | None:
        """Return the updates made since the last call, which waits for the device; None where the host knows."""
        if not self.freezes_on_device:
            return None
        made = int(self._updates)
        self._updates.zero_()
        return made

    def throwaway_backward(self, batch: Any) -> None:
        """Compute forward and backward and drop the gradients, so that libraries set up what a first pass sets up."""
        self.updater.backward(self._loss_fn(self._model, batch))
        self.updater.drop_gradients()

    # -- as one CUDA graph -------------------------------------------------------------------

    def record(self, get_batch: Callable[[], Any]) -> None:
        """Record the step as a CUDA graph if the configuration wants it, or log why that is not possible.

        Weights, optimizer and random states do not change; their tensors must keep their addresses from now on.

        Args:
            get_batch: returns any batch of this rank, on the device.
        """
        wanted = self._config.cuda_graph
        if not self.freezes_on_device or not (self._computes_the_same_every_time if wanted is None else wanted):
            return
        reason = why_not(self._accelerator, hooks=bool(self._hooks))
        if reason is None:
            try:
                self._recorded = RecordedStep(self._on_device, get_batch(), self._frozen.fill_)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                self.updater.drop_gradients()
        if reason is not None:
            log.info("the step is not recorded as a CUDA graph, its kernels are launched one by one: %s", reason)

    @property
    def _computes_the_same_every_time(self) -> bool:
        """Whether only tensors decide what a step computes, which is known of this package's model and losses."""
        model = self._accelerator.unwrap_model(self._model, keep_torch_compile=False)
        return isinstance(model, TransformerLM) and self._loss_fn in _OUR_LOSSES

    def _on_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute a step of one micro-step except for its schedule; return the loss and the gradient norm."""
        self.updater.drop_gradients()
        loss = self._backward(batch)
        norm = self.updater.clip(self._max_norm)
        self._freeze_unless_finite(loss, norm)
        self.updater.apply()
        return loss, norm
