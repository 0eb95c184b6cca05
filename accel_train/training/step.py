"""One step: forward, loss and backward of its micro-steps, then clipping, optimizer, schedule and zero_grad.

On a CPU a loss or gradient that is not finite ends the step at once. On a GPU the host does not wait to see it: from
the first bad step on the fused optimizer changes nothing, and the host finds out at the next log boundary.

Without a loss scaler and without sharding Accelerate's wrappers end in plain PyTorch calls, but look at signatures,
environment and installed packages in every step: 0.3 ms, which is a sixth of a step of a very small model
(docs/benchmarks.md). The step then calls PyTorch itself, in the same order and with the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from accel_train.config.sections import TrainingConfig
from accel_train.model.transformer import TransformerLM
from accel_train.training.hooks import Hooks
from accel_train.training.losses import LossFunction, fused_cross_entropy, next_token_cross_entropy
from accel_train.training.recorded_step import RecordedStep, why_not

log = logging.getLogger(__name__)

_MAX_SKIPPED_IN_A_ROW = 50
"""Overflows of fp16 gradients in a row that end a run: the loss scale is then 2^-50 of what it was."""


def wrappers_add_nothing(accelerator: Accelerator) -> bool:
    """Return whether the calls of a step may go past Accelerate's wrappers: no loss scaler and no sharding."""
    plain = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    return accelerator.distributed_type in plain and accelerator.scaler is None


def build_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW, fused where the device has the kernel; weight decay on all parameters or on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": config.weight_decay}]
    if config.weight_decay_on == "matrices":
        groups[0]["params"] = [p for p in trained if p.dim() >= 2]
        groups.append({"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0})
    fused = device.type in {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


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
        hooks: Hooks,
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.grad_norm: Tensor | None = None
        """Gradient norm of the last step before clipping, a scalar on the device."""
        self.is_direct = wrappers_add_nothing(accelerator)
        """Whether the step calls PyTorch itself, past Accelerate's wrappers."""
        self._accelerator, self._model, self._loss_fn, self._config = accelerator, model, loss_fn, config
        self._optimizer = optimizer.optimizer if self.is_direct else optimizer
        self._scheduler = scheduler.scheduler if self.is_direct else scheduler
        self._scale: float | None = None
        """The loss scale after the last update; None before the first one, since a checkpoint may set it."""
        self._scaler, self._hooks, device = accelerator.scaler, hooks, accelerator.device
        self._accumulation: int = accelerator.gradient_accumulation_steps
        self._micro_steps = self._skipped_in_a_row = 0
        on_device = self._optimizer.param_groups if self.is_direct and device.type == "cuda" else []
        self._rates = [torch.zeros((), dtype=torch.float32, device=device) for _ in on_device]
        self._frozen = torch.zeros((), dtype=torch.float32, device=device)
        self._updates = torch.zeros_like(self._frozen)
        self._recorded: RecordedStep | None = None
        self.freezes_on_device = False
        # With loss scaling an overflow is normal and the scaler skips the step by itself.
        if self._scaler is None and device.type == "cuda":
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
            self._send_rates()
            loss, self.grad_norm = self._recorded(batch)
            return loss
        with self._gradient_sync():
            return self._backward(batch)

    def _gradient_sync(self) -> AbstractContextManager[Any]:
        """Return the context of a micro-step: in the last one of a step the ranks sum their gradients."""
        if not self.is_direct:
            return self._accelerator.accumulate(self._model)  # type: ignore[no-any-return]
        self._micro_steps += 1
        return nullcontext() if self.is_complete else self._accelerator.no_sync(self._model)

    def _backward(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._model, batch)
        value = loss.detach()
        if self._accelerator.num_processes > 1:
            # Times 1 exactly, or NaN: a loss that is not finite reaches every rank's gradients.
            loss = loss * (value * 0 + 1)
        if self.is_direct:
            torch.autograd.backward(loss if self._accumulation == 1 else loss / self._accumulation)
        else:
            self._accelerator.backward(loss)
        return value

    @property
    def is_complete(self) -> bool:
        """Whether the last micro-step was the last one of its step, so that :meth:`update` follows."""
        return self._micro_steps % self._accumulation == 0 if self.is_direct else self._accelerator.sync_gradients

    def update(self, loss: Tensor, step: int) -> Outcome:
        """Run the update hooks, clip, and update weights and schedule; the gradients are gone afterwards.

        Args:
            loss: loss of the last micro-step.
            step: steps done before this one.
        """
        if self._recorded is not None:
            self._scheduler.step()
            return Outcome.MADE
        if self._hooks:
            # Hooks see true gradients: without this fp16's would still be multiplied by the loss scale.
            self._accelerator.unscale_gradients()
            self._hooks.apply_update(step, self.parameters)
        self.grad_norm = norm = self._clip()
        if self.freezes_on_device:
            self._freeze_unless_finite(loss, norm)
        elif self._scaler is None and not math.isfinite(float(norm) + float(loss)):
            # On CPU reading costs nothing; the norm is that of the summed gradients, equal on all ranks.
            return Outcome.NOT_FINITE
        self._send_rates()
        made = self._apply_scaled(self._scaler) if self._scaler is not None else self._apply()
        if made:
            self._scheduler.step()
        self._optimizer.zero_grad()
        self._skipped_in_a_row = 0 if made else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
            # No scale is small enough: it is not the scale. The gradients of all ranks are equal, so all leave.
            return Outcome.NOT_FINITE
        return Outcome.MADE if made else Outcome.SKIPPED

    def _clip(self) -> Tensor:
        """Scale the gradients to a global norm of at most ``max_grad_norm`` and return the norm before, a scalar."""
        # Accelerate would unscale again what was unscaled for the hooks.
        is_unscaled = bool(self._hooks) and self._scaler is not None
        clip = nn.utils.clip_grad_norm_ if self.is_direct or is_unscaled else self._accelerator.clip_grad_norm_
        return clip(self.parameters, self._config.max_grad_norm or math.inf)

    def _send_rates(self) -> None:
        """Copy the learning rates to the GPU, where :meth:`_apply` reads them: a CUDA graph takes no numbers."""
        if self._rates:
            for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])

    def _apply_scaled(self, scaler: torch.amp.GradScaler) -> bool:
        """Update the weights unless a gradient overflows; return whether that was done, which waits for the device."""
        before = scaler.get_scale() if self._scale is None else self._scale
        self._optimizer.step()
        # Only the scale tells: Accelerate takes every call of a fused optimizer for an update.
        self._scale = float(scaler.get_scale())
        return self._scale >= before

    def _apply(self) -> bool:
        """Update the weights; on a GPU with the learning rates last sent, with the same bits recorded or not."""
        if not self._rates:
            self._optimizer.step()
            return True
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
        return True

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
        self._backward(batch)
        self._optimizer.zero_grad()

    # -- as one CUDA graph -------------------------------------------------------------------

    def record(self, get_batch: Callable[[], Any]) -> None:
        """Record the step as a CUDA graph if the configuration wants it, or log why that is not possible.

        Weights, optimizer and random states do not change; their tensors must keep their addresses from now on.

        Args:
            get_batch: returns any batch of this rank, on the device.
        """
        wanted, level = self._config.cuda_graph, logging.WARNING
        if wanted is None:
            # Only tensors decide what a step computes: known of this package's model and losses alone.
            model = self._accelerator.unwrap_model(self._model, keep_torch_compile=False)
            ours = (next_token_cross_entropy, fused_cross_entropy)
            wanted, level = isinstance(model, TransformerLM) and self._loss_fn in ours, logging.INFO
        if not wanted or not (self.freezes_on_device or self._accelerator.device.type == "cuda"):
            return
        reason = why_not(self._accelerator, hooks=bool(self._hooks))
        if reason is None:
            try:
                self._recorded = RecordedStep(self._on_device, get_batch(), self._frozen.fill_)
            except RuntimeError as error:
                reason, level = str(error).partition("\n")[0], logging.WARNING
                self._optimizer.zero_grad()
        if reason is not None:
            log.log(level, "the step is not recorded as a CUDA graph, its kernels are launched one by one: %s", reason)

    def _on_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute a step of one micro-step except for its schedule; return the loss and the gradient norm."""
        self._optimizer.zero_grad()
        loss = self._backward(batch)
        norm = self._clip()
        self._freeze_unless_finite(loss, norm)
        self._apply()
        return loss, norm
