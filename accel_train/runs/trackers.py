"""Experiment trackers, through Accelerate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator

from accel_train.training.callbacks import Callback, LoopState


class Trackers(Callback):
    """Sends every log line and every evaluation to Accelerate's trackers.

    Args:
        accelerator: made with the trackers.
        project: project name given to them.
        config: hyperparameters, as nested JSON values.
    """

    def __init__(self, accelerator: Accelerator, project: str, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        accelerator.init_trackers(project, dict(_flat(config)))

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """Send the figures of a log interval."""
        self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """Send the figures of an evaluation."""
        figures = {k: v for k, v in evaluation.get("metrics", {}).items() if v is not None}
        self._accelerator.log(figures, step=evaluation["step"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Dotted names and plain values, as trackers want their hyperparameters."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str) else str(value)
