"""Callbacks and the view of the loop that they get.

The view's tensor fields are read lazily: a callback that looks at ``loss`` or ``grad_norm`` on
a GPU waits for the device at that moment, one that does not look costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class LoopState:
    """Where the loop stands; the same object throughout a run, its fields move on."""

    step: int = 0
    """Steps done."""
    epoch: int = 0
    """Epochs completed before the one in progress."""
    skipped_steps: int = 0
    """Those among them that loss scaling left out because a gradient overflowed (fp16 only)."""
    total_steps: int = 0
    """Steps of the whole run."""
    steps_per_epoch: int = 0
    """Steps of one epoch."""
    schedule: Callable[[int], float] = field(default=lambda _step: 0.0, repr=False)
    """Learning rate of update number ``step``, counted from 0."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean loss of every validation dataset, by its name, in the evaluation at hand."""
    _loss: torch.Tensor | None = field(default=None, repr=False)
    _grad_norm: torch.Tensor | None = field(default=None, repr=False)

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
        """At every log interval: step, epoch, loss, lr, grad_norm, tokens_per_second, seconds."""

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """After every evaluation; ``evaluation`` holds step, epoch and what the evaluator returned."""

    def on_epoch_end(self, state: LoopState) -> None:
        """After an epoch, its evaluation and its checkpoint."""

    def on_checkpoint(self, state: LoopState, path: Path) -> None:
        """After checkpoint ``path`` has been committed: at the next save, or when training ends."""

    def on_train_end(self, state: LoopState) -> None:
        """After the last step of a run that ended by itself (not when preempted)."""


def overriding(callbacks: Iterable[Callback], name: str) -> list[Any]:
    """The bound methods ``name`` of those callbacks that override it, so that nothing else is called."""
    return [getattr(c, name) for c in callbacks if getattr(type(c), name) is not getattr(Callback, name)]
