"""The one judge of a run: in the course of training, at its end, and whenever somebody asks again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from accel_train.process.work import WorkContext
from accel_train.tasks.base import Task, Trained


class Judge:
    """Asks a task for its verdicts.

    Args:
        task: its data are opened.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], work: WorkContext) -> dict[str, Any]:
        """Return the evaluation of a model in training as JSON values; ``stop`` says whether training may end.

        Args:
            model: unwrapped.
            losses: mean loss of every validation dataset.
            work: asked now and then whether to stop.
        """
        evaluation = self._task.evaluate(model, losses, work)
        passed = evaluation.verdict is not None and evaluation.verdict.passed
        return {**evaluation.to_dict(), "stop": passed and self._task.stops_on_pass}

    def conclude(
        self,
        model: nn.Module,
        checkpoint: Path,
        evaluation: Mapping[str, Any],
        epoch_losses: Sequence[float],
        work: WorkContext,
    ) -> dict[str, Any] | None:
        """Return the last judgement of a finished model; None when its last evaluation stands.

        Args:
            model: the final weights, unwrapped.
            checkpoint: the same weights on disk.
            evaluation: the last one.
            epoch_losses: mean training loss of every whole epoch.
            work: asked now and then whether to stop.
        """
        trained = Trained(model, checkpoint, dict(evaluation), list(epoch_losses))
        concluded = self._task.conclude(trained, work)
        return None if concluded is None else concluded.to_dict()


def epoch_means(losses: Sequence[float], steps_per_epoch: int) -> list[float]:
    """Return the mean of the training losses of every whole epoch."""
    starts = range(0, len(losses) - steps_per_epoch + 1, steps_per_epoch)
    return [sum(losses[start : start + steps_per_epoch]) / steps_per_epoch for start in starts]
