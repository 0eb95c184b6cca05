"""Callbacks, and the state of the loop that they see.

``loss`` and ``grad_norm`` stay on the device until they are read: a callback that reads one waits for a GPU, one that
does not costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class LoopState:
    """State of the loop: one object per run, whose fields the loop updates."""

    step: int = 0
    """Steps done."""
    skipped_steps: int = 0
    """Steps among them that loss scaling left out because a gradient overflowed (fp16 only)."""
    epoch: int = 0
    """Epochs completed before the one in progress."""
    total_steps: int = 0
    """Steps of the whole run."""
    steps_per_epoch: int = 0
    """Steps of one epoch."""
    schedule: Callable[[int], float] = field(default=lambda _step: 0.0, repr=False)
    """Learning rate of update number ``step``, counted from 0."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean loss of every validation dataset, by its name, in the last evaluation."""
    _loss: torch.Tensor | None = field(default=None, repr=False)
    _grad_norm: torch.Tensor | None = field(default=None, repr=False)

    def observe(self, loss: torch.Tensor, grad_norm: torch.Tensor | None) -> None:
        """Set the loss and the gradient norm of a step, scalars on the device, without reading them."""
        self._loss, self._grad_norm = loss, grad_norm

    @property
    def lr(self) -> float:
        """Learning rate of the last step; before the first one, that of the first."""
        return self.schedule(max(self.step - self.skipped_steps - 1, 0))

    @property
    def loss(self) -> float:
        """Loss of the last micro-step on this rank; reading it waits for the device."""
        return float("nan") if self._loss is None else float(self._loss)

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; reading it waits for the device."""
        return float("nan") if self._grad_norm is None else float(self._grad_norm)


class Callback:
    """Base of all callbacks: override what you need. Called on every rank, in registration order.

    An exception raised by a callback ends the run.
    """

    def on_train_start(self, state: LoopState) -> None:
        """Before the first step of this launch, after a checkpoint has been loaded."""

    def on_step_end(self, state: LoopState) -> None:
        """After every step."""

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """At every log interval.

        ``line`` holds step, epoch, loss (mean of the last ``log_interval`` steps), lr, grad_norm, tokens_seen,
        tokens_per_second and the scalars of the forward hooks.
        """

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """After every evaluation, before its checkpoint.

        ``evaluation`` holds step, epoch (counted from 1) and what the evaluator returned; ``<name>_loss`` of every
        validation dataset stands among its ``metrics``.
        """

    def on_epoch_end(self, state: LoopState) -> None:
        """After an epoch and after the last step, once its evaluation is done and its checkpoint is saved."""

    def on_checkpoint(self, state: LoopState, path: Path) -> None:
        """After checkpoint ``path`` is committed: at the next save, or when training ends or is preempted."""

    def on_train_end(self, state: LoopState) -> None:
        """After the last step of a run that ended by itself (not when preempted)."""


def overriding(callbacks: Iterable[Callback], name: str) -> list[Any]:
    """Return the bound methods ``name`` of the callbacks that override it."""
    return [getattr(c, name) for c in callbacks if getattr(type(c), name) is not getattr(Callback, name)]
