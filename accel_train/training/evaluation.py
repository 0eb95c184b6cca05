"""An evaluation: the losses on held-out datasets, by all ranks together; then the evaluator, on the main process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from accel_train.checkpoints.random_states import preserved_random_state
from accel_train.data.loader import DatasetWithIds
from accel_train.model.generation import keep_recordings
from accel_train.process.fault_points import EVALUATION_BEGUN
from accel_train.process.work import StopCheck, WorkContext
from accel_train.ranks.coordinator import Coordinator
from accel_train.training.callbacks import LoopState
from accel_train.training.losses import LossFunction, count_targets
from accel_train.training.plan import Plan

Evaluator = Callable[[nn.Module, LoopState, StopCheck], dict[str, Any]]
"""``evaluator(model, loop_state, should_stop)``: called on the main process with the unwrapped
model; returns JSON values. ``"passed": True`` marks the checkpoint to keep, ``"stop": True`` ends
training, ``"samples"`` are handed to the callbacks and not kept in the state. The training's random
states are put back after it."""


@dataclass(frozen=True)
class Share:
    """Which batches of a dataset a rank takes, and how it talks to the others; by default there are none."""

    batch_size: int
    """Samples of a batch; the same for any number of ranks."""
    rank: int = 0
    world_size: int = 1
    after_round: Callable[[], None] = lambda: None
    """Called by every rank after every round of batches; leaves by an exception on all ranks or on none."""
    gather: Callable[[Any], Sequence[Any]] = lambda value: [value]
    """Returns every rank's value, in rank order."""


def mean_loss(
    model: nn.Module, dataset: DatasetWithIds, loss_fn: LossFunction, device: torch.device, share: Share
) -> float:
    """Return the mean loss per target over all of ``dataset``, in evaluation mode, each target counted once.

    Batches go to the ranks in turn. A rank without a batch in the last round computes the first one
    and does not count it, so that no rank waits alone in a collective of the model.

    Args:
        model: wrapped or not; left in training mode.
        dataset: a last batch may be smaller.
        loss_fn: ``loss_fn(model, batch)`` returns the mean over the batch's targets.
        device: where the batches go.
        share: this rank's part.

    Returns:
        The same number on every rank.
    """
    batches = -(-len(dataset) // share.batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = 0
    model.eval()
    try:
        with torch.no_grad(), preserved_random_state(device):
            for first in range(0, batches, share.world_size):
                number = first + share.rank
                start = number * share.batch_size if number < batches else 0
                _, batch = dataset.__getitems__(np.arange(start, min(start + share.batch_size, len(dataset))))
                loss = loss_fn(model, send_to_device(batch, device))
                if number < batches:
                    count = count_targets(batch)
                    total += loss.double() * count
                    targets += count
                share.after_round()
    finally:
        model.train()
    sums = share.gather([float(total), targets])
    return float(sum(part for part, _ in sums) / max(sum(count for _, count in sums), 1))


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the model of a trainer; false if there is nothing to evaluate."""

    evaluate: Evaluator | None
    """None: losses only."""
    validation: Mapping[str, Any]
    """Held-out datasets by name."""
    loss_fn: LossFunction
    """Returns the mean over a batch's targets."""
    plan: Plan
    """Gives rank, number of ranks and batch size."""
    device: torch.device
    """Where the batches go."""
    coordinator: Coordinator
    """Agreement between the ranks."""
    reached: Callable[[str], None]
    """Called with every fault point."""

    def __bool__(self) -> bool:
        return self.evaluate is not None or bool(self.validation)

    def losses(self, model: nn.Module, poll: StopCheck) -> dict[str, float]:
        """Return the mean loss on every validation dataset, on every rank.

        Args:
            model: wrapped.
            poll: called after every round of batches; true on all ranks or on none.

        Raises:
            Interrupted: a rank was asked to stop; the random states are those before.
        """

        def gather(sums: Any) -> list[Any]:
            WorkContext(should_stop=self.coordinator.drain).check()
            return self.coordinator.gather("validation loss", sums)

        plan = self.plan
        share = Share(plan.micro_batch, plan.rank, plan.world_size, WorkContext(should_stop=poll).check, gather)
        return {
            name: mean_loss(model, DatasetWithIds(dataset), self.loss_fn, self.device, share)
            for name, dataset in self.validation.items()
        }

    def verdict(self, model: nn.Module, state: LoopState) -> dict[str, Any]:
        """Return what the evaluator returns, on every rank; empty without one.

        Args:
            model: unwrapped.
            state: holds the losses.

        Raises:
            Interrupted: a rank was asked to stop.
            TypeError: the evaluator returned no dictionary.
        """
        evaluate = self.evaluate
        if evaluate is None:
            return {}

        def judge(should_stop: StopCheck) -> dict[str, Any]:
            self.reached(EVALUATION_BEGUN)
            # On the main process alone: what it drew here would set its dropout apart from an undisturbed run's.
            with preserved_random_state(self.device), keep_recordings():
                verdict = evaluate(model, state, should_stop)
            if not isinstance(verdict, dict):
                raise TypeError(f"evaluate() must return a dictionary of JSON values, not {type(verdict).__name__}")
            return verdict

        return dict(self.coordinator.main_phase("evaluation", judge))
